"""Loading and saving: layouts agree, choices are kept, wrong files are refused in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from errors import InputError
from models.checkpoints import fetch, fill, hub_files, part_of, read_config, read_part
from models.names import FAMILIES
from models.text import compact_vocabulary
from tests.conftest import FIXTURES, TINY, fixture_arch, hub_folder

SINGLE = FIXTURES / "sd1_tiny" / "model.safetensors"
SINGLE2 = FIXTURES / "sd2_tiny" / "model.safetensors"
ARCH, ARCH2 = fixture_arch("sd1_tiny"), fixture_arch("sd2_tiny")
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def state():
    return load_file(SINGLE)


@pytest.fixture(scope="module")
def plain():
    return models.load(SINGLE, arch=ARCH)


@pytest.fixture
def write(tmp_path):
    """A safetensors file of the given tensors."""

    def to_file(tensors, name="model.safetensors", **notes):
        save_file({k: t.clone().contiguous() for k, t in tensors.items()}, tmp_path / name, notes or None)
        return tmp_path / name

    return to_file


def refused(path, arch=ARCH, **options) -> str:
    """The one line with which `load` refuses."""
    with pytest.raises(InputError) as error:
        models.load(path, arch=arch, **options)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Layouts


def test_both_layouts_are_one_model(plain, tmp_path):
    folder = models.load(hub_folder(tmp_path / "model"))
    same(plain, folder)
    assert folder.image_size == 16 and folder.prediction == "epsilon"  # sample_size 8, twice that in pixels
    assert folder.text.tokenize(["a cat"]).tolist() == plain.text.tokenize(["a cat"]).tolist()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_pickled_tensors(state, plain, tmp_path, nested, zipped):
    content = {"state_dict": state, "global_step": 3} if nested else state
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    same(models.load(tmp_path / "model.ckpt", arch=ARCH), plain)


@pytest.mark.parametrize("linear", [True, False])
def test_a_1x1_convolution_on_pixels_is_a_linear(state, plain, write, linear):
    """1.x stores convolutions, 2.x linear layers; the hub's and the original autoencoder differ likewise."""
    reshape = (lambda t: t.flatten(1)) if linear else (lambda t: t.reshape(len(t), -1, 1, 1))
    changed = {k: reshape(t) for k, t in state.items() if ".1.proj_" in k and k.endswith("weight")}
    assert len(changed) == 2 * 6  # transformers: two on the way down, one between, three on the way up
    same(models.load(write(state | changed), arch=ARCH), plain)


@pytest.mark.parametrize(
    "family, sizes, published",
    [
        ("cond_stage_model.transformer.", {}, (859_520_964, 83_653_863, 123_060_480)),
        ("cond_stage_model.model.", {"prediction": "v"}, (865_910_724, 83_653_863, 340_387_840)),
    ],
)
def test_named_sizes_have_the_published_numbers_of_parameters(family, sizes, published):
    """UNet, autoencoder and text encoder of Stable Diffusion 1.5 and 2.1, as published on the hub."""
    model = models.build({"schedule": {}} | FAMILIES[family] | sizes, meta=True)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.unet, model.autoencoder, model.text)]
    assert tuple(counts) == published


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_rounds_once(plain, dtype):
    model = models.load(SINGLE, arch=ARCH, dtype=dtype)
    for name, p in model.named_parameters():
        assert torch.equal(p, plain.get_parameter(name).to(dtype)), name


@pytest.mark.parametrize("with_clip", [True, False])
def test_a_saved_model_comes_back(tmp_path, with_clip):
    config = TINY if with_clip else {k: v for k, v in TINY.items() if k != "vision"}
    model = models.build(config, seed=0, vocabulary=compact_vocabulary(["a red heart"]))
    models.save(model, tmp_path / "full", dtype=None)
    again = models.load(tmp_path / "full")
    assert again.fingerprint == model.fingerprint and (again.clip is not None) == with_clip
    assert not any(p.requires_grad or p.is_meta for p in again.parameters())
    models.save(model, tmp_path / "half")
    half = models.load(tmp_path / "half", dtype=torch.float64)
    assert half.dtype == torch.float64
    for name, p in half.named_parameters():
        torch.testing.assert_close(p.float(), model.get_parameter(name), atol=1e-3, rtol=1e-3)


def test_folders_of_earlier_versions_load(plain, tmp_path):
    """Their config tells two kinds of UNet apart, one of which has 1x1 convolutions."""
    models.save(plain, tmp_path, dtype=None)
    same(models.load(tmp_path), plain)
    config = read_config(tmp_path)
    config["unet"]["use_linear_projection"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "unet.safetensors")
    changed = {k: t.reshape(*t.shape, 1, 1) for k, t in tensors.items() if ".1.proj_" in k and t.ndim == 2}
    save_file(tensors | changed, tmp_path / "unet.safetensors")
    same(models.load(tmp_path), plain)
    assert "use_linear_projection" not in read_config(tmp_path)["unet"]


def test_a_part_is_filled_where_it_fits(tiny_model, tmp_path):
    models.save(tiny_model, tmp_path, dtype=None)
    other = models.build(TINY, seed=5)
    for part in ("autoencoder", "clip", "unet"):
        fill(part_of(other, part), read_part(tmp_path, part), tmp_path)
    same(other, tiny_model)
    with pytest.raises(InputError, match="unexpected"):
        fill(other.unet, read_part(tmp_path, "autoencoder"), tmp_path)


def test_memory_stays_near_the_size_of_the_file_which_is_let_go(tmp_path):
    """And no random weights are drawn for the sake of being overwritten."""
    config = TINY | {"unet": TINY["unet"] | {"model_channels": 192, "num_res_blocks": 2}}
    models.save(models.build(config, seed=0), tmp_path, dtype=None)
    file = sum(part.stat().st_size for part in tmp_path.glob("*.safetensors"))
    models.load(tmp_path)  # imports its libraries
    before = torch.get_rng_state()
    for dtype, most in ((torch.float32, 1.15), (torch.bfloat16, 0.75)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now
        start = resident("VmHWM")
        model = models.load(tmp_path, dtype=dtype)
        assert resident("VmHWM") - start < most * file
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        del model
    assert torch.equal(torch.get_rng_state(), before)


def resident(name) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


# Choices


def test_averaged_or_plain_weights(state, plain, write):
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor * 2
        for name, tensor in state.items()
        if name.startswith(UNET)
    }
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5, dtype=torch.int)}
    full = write(state | averages | counters)
    same(models.load(full, arch=ARCH, ema=False), plain)
    for ema in (None, True):
        averaged = models.load(full, arch=ARCH, ema=ema)
        assert torch.equal(averaged.unet.out[2].weight, 2 * plain.unet.out[2].weight)
        same(averaged.autoencoder, plain.autoencoder)
        same(averaged.text, plain.text)
    assert "ema=true" in refused(SINGLE, ema=True)
    averages.popitem()
    assert "ema=false" in refused(write(state | averages, "less.safetensors"))


@pytest.mark.parametrize("key, value", [("predict_key", "v"), ("prediction_type", "v"), ("predict_key", "epsilon")])
def test_a_file_may_state_its_prediction(write, key, value):
    arch = {section: sizes for section, sizes in ARCH2.items() if section != "prediction"}
    file = write(load_file(SINGLE2), **{f"modelspec.{key}": value})
    assert models.load(file, arch=arch).prediction == value
    other = "v" if value == "epsilon" else "epsilon"
    assert "prediction" in refused(file, arch=arch | {"prediction": other})
    assert "prediction" in refused(SINGLE2, arch=arch)  # nothing states it
    marked = write(load_file(SINGLE2) | {"v_pred": torch.tensor([])}, "marked.safetensors")
    assert models.load(marked, arch=arch).prediction == "v"


@pytest.mark.parametrize("prediction, ours", [("v_prediction", "v"), ("epsilon", "epsilon")])
def test_a_hub_folder_states_prediction_schedule_and_padding(tmp_path, prediction, ours):
    folder = hub_folder(tmp_path / "model")
    config = {"prediction_type": prediction, "beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.02}
    for place, content in (
        ("scheduler/scheduler_config.json", config),
        ("tokenizer/special_tokens_map.json", {"pad_token": {"content": "!"}}),
    ):
        (folder / place).parent.mkdir()
        (folder / place).write_text(json.dumps(content))
    model = models.load(folder)
    assert (model.prediction, model.text.pad_token) == (ours, 0)
    assert model.schedule.alpha_bars[0].item() == pytest.approx(1 - 0.001)
    assert "beta_end" in refused(folder, arch={"schedule": {"beta_end": 0.012}})
    for wrong in ({"prediction_type": "sample"}, {"rescale_betas_zero_snr": True}):
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | wrong))
        refused(folder, arch=None)


def test_heads_of_a_hub_folder(tmp_path):
    folder = hub_folder(tmp_path / "model")
    config = json.loads((folder / "unet" / "config.json").read_text())
    for heads, ours in (([2, 4], {"num_head_channels": 16}), ([4, 4], {"num_heads": [4, 4]})):
        (folder / "unet" / "config.json").write_text(json.dumps(config | {"attention_head_dim": heads}))
        unet = models.load(folder).config["unet"]
        assert ours.items() <= unet.items() and len({"num_heads", "num_head_channels"} & set(unet)) == 1
    for heads in ([4], "8", [0, 4]):
        (folder / "unet" / "config.json").write_text(json.dumps(config | {"attention_head_dim": heads}))
        refused(folder, arch=None)


def test_unused_layers_and_rows_are_left_out(write):
    """2.x conditions on the second-to-last layer; textual inversion adds rows to the embedding."""
    tensors, text = load_file(SINGLE2), "cond_stage_model.model."
    penultimate = models.load(SINGLE2, arch=ARCH2)
    shorter = {"text": ARCH2["text"] | {"layers": 3, "hidden_layer": "last"}}
    embedding = tensors[text + "token_embedding.weight"]
    longer = {text + "token_embedding.weight": torch.cat([embedding, torch.ones(2, embedding.shape[1]).half()])}
    for file in (SINGLE2, write(tensors | longer | {"global_step": torch.tensor(5)})):
        last = models.load(file, arch=ARCH2 | shorter)
        torch.testing.assert_close(last.text(["a cat"]), penultimate.text(["a cat"]))


def test_clip_scores_do_not_depend_on_the_precision(tiny_model, tmp_path):
    """Nor does the text that conditions a half-precision UNet leave its precision."""
    models.save(tiny_model, tmp_path)
    image = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        model = models.load(tmp_path, dtype=dtype)
        states = model.encode_text(["a cat"]).states
        assert model.dtype == states.dtype == model.unet.out[2].weight.dtype == dtype
        clip = model.clip
        scores.append(clip.image_features(image) @ clip.text_features(["a cat", "a red heart"]).T)
        assert model.text.pool(states, model.text.tokenize(["a cat"])).isfinite().all()
    torch.testing.assert_close(*scores, atol=1e-3, rtol=0)


def test_another_noise_schedule_is_noticed(state, write):
    alpha_bars = state["alphas_cumprod"].clone()
    models.load(write(state | {"alphas_cumprod": alpha_bars.bfloat16()}), arch=ARCH)
    for wrong in (0.0, float("nan")):  # zero terminal SNR, and nonsense
        alpha_bars[-1] = wrong
        assert "schedule" in refused(write(state | {"alphas_cumprod": alpha_bars}))


# Refusals


@pytest.mark.parametrize(
    "arch, word",
    [
        ({"unett": {"num_heads": 4}}, "unett"),
        ({"unet": {"widht": 5}}, "widht"),
        ({"unet": {"num_heads": 5}}, "heads"),
        ({"unet": {"context_dim": 64}}, "to_kv"),
        ({"image_size": "big"}, "big"),
        ({"text": {"pad_token": 600}}, "pad_token"),
        ({"vae": {"scale_factor": 0}}, "scale_factor"),
        ({"schedule": {"kind": "straight"}}, "straight"),
        ({"prediction": "x0"}, "x0"),
    ],
)
def test_senseless_arch(arch, word):
    whole = ARCH | {k: ARCH[k] | v if isinstance(v, dict) and k in ARCH else v for k, v in arch.items()}
    assert word in refused(SINGLE, arch=whole)


def test_keys_that_do_not_fit_are_named_and_counted(state, write):
    key = UNET + "time_embed.0.bias"
    assert "time_embed.0.bias is missing" in refused(write({k: t for k, t in state.items() if k != key}))
    assert "surprise is unexpected" in refused(write(state | {UNET + "surprise": torch.ones(3)}))
    assert "[7]" in refused(write(state | {key: torch.zeros(7)}))
    assert "int8" in refused(write(state | {key: state[key].to(torch.int8)}))
    few = {k: t for k, t in state.items() if ".norm3." not in k}
    message = refused(write(few))
    assert message.count("is missing") == 3 and message.endswith(f"and {len(state) - len(few) - 3} more")
    half = {k: t for k, t in state.items() if not k.endswith("attn1.to_k.weight")}
    assert "attn1.to_qkv.weight is missing" in refused(write(half))


@pytest.mark.parametrize(
    "keys, word",
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "LoRA"),
        (["conditioner.embedders.0.transformer.x", UNET + "input_blocks.0", "first_stage_model.x"], "SDXL"),
        ([UNET + "joint_blocks.0.context_block.x"], "SD3"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "part"),
        (["text_model.encoder.layers.0.x"], "part"),
        (["bert.embeddings.weight"], "bert"),
        ([], "no Stable Diffusion"),
    ],
)
def test_other_kinds_of_files_are_named(write, keys, word):
    assert word in refused(write({key: torch.zeros(2) for key in keys}))


@pytest.mark.parametrize("share", [0, 1e-5, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_truncated_files(state, tmp_path, suffix, share):
    file = tmp_path / f"model.{suffix}"
    if suffix == "ckpt":
        torch.save(state, file)
    content = file.read_bytes() if suffix == "ckpt" else SINGLE.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    refused(file)


NO_TENSORS = [b"<!DOCTYPE html><html></html>", b"PK\x03\x04" + bytes(300), b"\x80\x02}q\x00.", bytes(8) + b"{}"]


@pytest.mark.parametrize("content", NO_TENSORS)
def test_files_without_tensors(tmp_path, content):
    (tmp_path / "model.ckpt").write_bytes(content)
    refused(tmp_path / "model.ckpt")


def test_unreadable_and_missing_paths(tmp_path, monkeypatch):
    (tmp_path / "model.ckpt").write_bytes(b"")
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "not permitted")))
    assert "not permitted" in refused(tmp_path / "model.ckpt")
    monkeypatch.undo()
    for path in (tmp_path / "none", "a/b.safetensors", "../b", "name"):
        refused(path)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty")


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    for zipped in (True, False):
        torch.save({"a": torch.zeros(2), "b": Trap()}, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
        assert "run code" in refused(tmp_path / "m.ckpt")
    assert not (tmp_path / "sprung").exists()


def test_folders_that_do_not_fit(tiny_model, tmp_path):
    models.save(tiny_model, tmp_path / "own")
    assert "context_dim" in refused(tmp_path / "own", arch={"unet": {"context_dim": 768}})  # as with model=sd15
    config = read_config(tmp_path / "own")
    for section, sizes in [("unet", {"model_channels": 33}), ("text", {"heads": 5}), ("unet", {"model_channels": 64})]:
        (tmp_path / "own" / "config.json").write_text(json.dumps(config | {section: config[section] | sizes}))
        refused(tmp_path / "own", arch=None)
    (tmp_path / "own" / "config.json").write_text("{")
    assert "JSON" in refused(tmp_path / "own", arch=None)
    (tmp_path / "own" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "vae"}))
    assert "vae" in refused(tmp_path / "own", arch=None)
    (tmp_path / "own" / "unet.safetensors").unlink()
    assert "part=unet" in refused(tmp_path / "own", arch=None)
    folder = hub_folder(tmp_path / "hub")
    (folder / "vae" / "config.json").unlink()
    assert "vae/config.json" in refused(folder, arch=None)
    (folder / "text_encoder_2").mkdir()
    assert "SDXL" in refused(folder, arch=None)


# The hub


MODEL = "diffusion_pytorch_model"
SHARDS = [f"{MODEL}-0000{i}-of-00002.safetensors" for i in (1, 2)]
RELEASED = [f"{MODEL}{variant}.{kind}" for variant in ("", ".fp16", ".non_ema") for kind in ("bin", "safetensors")]


@pytest.mark.parametrize(
    "files, options, chosen",
    [
        (RELEASED, {}, [f"{MODEL}.safetensors"]),
        (RELEASED, {"half": True}, [f"{MODEL}.fp16.safetensors"]),
        (RELEASED, {"ema": False}, [f"{MODEL}.non_ema.safetensors"]),
        ([f"{MODEL}.bin", f"{MODEL}.fp16.safetensors"], {}, [f"{MODEL}.bin"]),  # precision before format
        ([f"{MODEL}.fp16.safetensors"], {}, [f"{MODEL}.fp16.safetensors"]),
        (SHARDS[::-1], {}, SHARDS),
        ([SHARDS[0], f"{MODEL}.bin"], {}, [f"{MODEL}.bin"]),  # an incomplete download is no choice
    ],
)
def test_one_complete_set_is_chosen(tmp_path, files, options, chosen):
    for name in [f"unet/{file}" for file in files] + [f"vae/{MODEL}.bin", "text_encoder/model.safetensors"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in hub_files(tmp_path, **options)["unet"]] == chosen
    (tmp_path / "vae" / f"{MODEL}.bin").unlink()
    with pytest.raises(InputError, match="vae"):
        hub_files(tmp_path, **options)


def test_shards_are_one_model(plain, tmp_path):
    folder = hub_folder(tmp_path / "model")
    file = folder / "unet" / f"{MODEL}.safetensors"
    tensors = load_file(file)
    for i, name in enumerate(SHARDS):
        save_file({k: tensors[k] for k in sorted(tensors)[i::2]}, folder / "unet" / name)
    file.unlink()
    same(models.load(folder), plain)


def test_a_hub_id_is_fetched_once_and_only_in_part(plain, tmp_path, monkeypatch):
    """A hub that has half precision only: the preferred files are not there, the others are asked for then."""
    asked, folder = [], tmp_path / "model"

    def snapshot_download(name, revision=None, local_files_only=False, allow_patterns=()):
        asked.append((name, revision, "cache" if local_files_only else allow_patterns[1]))
        if local_files_only and not folder.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("nothing cached")
        if not local_files_only and not (folder / "unet").exists() and "*" in allow_patterns[1].partition("model")[2]:
            hub_folder(folder, ".fp16.safetensors")
        folder.mkdir(exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    same(models.load("org/name@v1"), plain)
    patterns = ("cache", "unet/*model.safetensors", "unet/*model*.safetensors")
    assert asked == [("org/name", "v1", pattern) for pattern in patterns]
    asked.clear()
    models.load("org/name")
    assert asked == [("org/name", None, "cache")]


def test_offline_a_hub_id_that_is_not_cached_is_refused_in_one_line(tmp_path):
    code = "from models.checkpoints import fetch\ntry: fetch('org/none')\nexcept ValueError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.stdout.count("\n") == 1 and "org/none" in done.stdout, done.stderr


def test_a_closed_repository_says_how_to_log_in(monkeypatch):
    def snapshot_download(*_, **__):
        error = huggingface_hub.errors.GatedRepoError.__new__(huggingface_hub.errors.GatedRepoError)
        error.args = ("the server's\nlong words",)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match="auth login") as error:
        fetch("org/name")
    assert "\n" not in str(error.value)
