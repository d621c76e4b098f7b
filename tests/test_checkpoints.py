"""Reading Stable Diffusion: what is recognised, what is refused and how it is said, and that nothing is read twice."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from errors import InputError
from models.recognise import architecture
from models.weights import read_tensors

FIXTURES = Path(__file__).parent / "fixtures"
SINGLE = FIXTURES / "sd1_tiny" / "model.safetensors"
FOLDER = FIXTURES / "sd1_tiny" / "diffusers"
ARCH = json.loads((FIXTURES / "sd1_tiny" / "arch.json").read_text())
ARCH2 = json.loads((FIXTURES / "sd2_tiny" / "arch.json").read_text())


@pytest.fixture(scope="module")
def state():
    return load_file(SINGLE)


@pytest.fixture
def write(tmp_path):
    """A safetensors file of the given tensors."""

    def to_file(tensors, name="model.safetensors", **metadata):
        save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / name, metadata or None)
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


def test_both_layouts_are_one_model():
    single, folder = models.load(SINGLE, arch=ARCH), models.load(FOLDER)
    same(single, folder)
    for section in ("unet", "vae", "text", "schedule", "prediction"):
        assert single.config[section] == folder.config[section]
    assert folder.image_size == 16  # sample_size 8, twice that in pixels


def test_a_loaded_model_is_saved_and_comes_back(tmp_path):
    model = models.load(FOLDER)
    models.save(model, tmp_path / "own", dtype=None)
    again = models.load(tmp_path / "own")
    same(model, again)
    assert again.text.tokenize(["a cat"]).tolist() == model.text.tokenize(["a cat"]).tolist()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_tensors(state, tmp_path, nested, zipped):
    content = {"state_dict": state, "global_step": 3} if nested else state
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    same(models.load(tmp_path / "model.ckpt", arch=ARCH), models.load(SINGLE, arch=ARCH))


def test_the_kind_of_a_file_is_not_told_by_its_name(state, tmp_path, write):
    os.rename(write(state), tmp_path / "model.ckpt")
    same(models.load(tmp_path / "model.ckpt", arch=ARCH), models.load(SINGLE, arch=ARCH))


def test_averaged_or_plain_weights(state, write):
    prefix = "model.diffusion_model."
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor * 2
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5, dtype=torch.int)}
    full = write(state | averages | counters)
    plain = models.load(SINGLE, arch=ARCH)
    same(models.load(full, arch=ARCH, ema=False), plain)
    for ema in (None, True):
        averaged = models.load(full, arch=ARCH, ema=ema)
        assert torch.equal(averaged.unet.out[2].weight, 2 * plain.unet.out[2].weight)
        same(averaged.autoencoder, plain.autoencoder)
        same(averaged.text, plain.text)
    assert "ema=true" in refused(SINGLE, ema=True)
    averages.popitem()
    assert "model_ema.diffusion_model" in refused(write(state | averages, "less.safetensors"))


# What the weights do not tell


@pytest.mark.parametrize(
    "arch, words",
    [
        ({}, "UNet's heads"),
        ({"unet": {"num_heads": 4}}, "text's heads"),
        ({"unet": {"num_heads": 4}, "text": {"heads": 2}}, "prediction"),
    ],
)
def test_what_weights_do_not_tell_is_asked_for(arch, words):
    assert words in refused(FIXTURES / "sd2_tiny" / "model.safetensors", arch=arch)


def test_a_file_may_state_its_prediction(write):
    arch = {key: value for key, value in ARCH2.items() if key != "prediction"}
    tensors = load_file(FIXTURES / "sd2_tiny" / "model.safetensors")
    stated = write(tensors, **{"modelspec.prediction_type": "v"})
    assert models.load(stated, arch=arch).prediction == "v"
    assert "the model has v" in refused(stated, arch=arch | {"prediction": "epsilon"})


@pytest.mark.parametrize("prediction, ours", [("v_prediction", "v"), ("epsilon", "epsilon")])
def test_the_scheduler_config_tells_prediction_and_schedule(tmp_path, prediction, ours):
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    (folder / "scheduler").mkdir()
    config = {"prediction_type": prediction, "beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.02}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    model = models.load(folder)
    assert model.prediction == ours
    assert model.schedule.alpha_bars[0].item() == pytest.approx(1 - 0.001)
    other = {"v": "epsilon", "epsilon": "v"}[ours]
    assert f"arch.prediction is {other}, and the model has {ours}" in refused(folder, arch={"prediction": other})
    assert "arch.schedule.beta_end is 0.012" in refused(folder, arch={"schedule": {"beta_end": 0.012}})
    config["beta_schedule"] = "sigmoid"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert "beta_schedule=sigmoid" in refused(folder, arch=None)


def test_the_tokenizer_config_tells_the_padding(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    assert models.load(folder).text.pad_token == 599
    (folder / "tokenizer").mkdir()
    for pad, token in (("!", 0), ("<|endoftext|>", 599), ({"content": "!"}, 0)):
        (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))
        assert models.load(folder).text.pad_token == token


@pytest.mark.parametrize(
    "arch, words",
    [
        ({"unett": {"num_heads": 4}}, "arch.unett is unknown"),
        ({"unet": 4}, "arch.unet is 4"),
        ({"prediction": {"a": 1}}, "arch.prediction is"),
        ({"image_size": "big"}, "image_size is 'big'"),
        ({"text": {"pad_token": "x"}}, "pad_token is 'x'"),
        ({"text": {"pad_token": 600}}, "from 0 to 599"),
        ({"vae": {"scale_factor": 0}}, "scale_factor is 0"),
        ({"unet": {"num_heads": 0}}, "into 0 heads"),
        ({"unet": {"num_heads": 5}}, "into 5 heads"),
        ({"unet": {"widht": 5}}, "with the arch that is given"),
    ],
)
def test_senseless_arch_is_told(arch, words):
    both = {k: ARCH[k] | v if k in ("unet", "text", "vae") and isinstance(v, dict) else v for k, v in arch.items()}
    with pytest.raises(InputError) as error:
        models.load(SINGLE, arch=ARCH | both)
    assert words in str(error.value) and "\n" not in str(error.value)
    for path in (None, 123, ""):
        with pytest.raises(InputError, match="the weights are"):
            models.load(path)
    with pytest.raises(InputError, match="arch is 'foo'"):
        models.load(SINGLE, arch="foo")


@pytest.mark.parametrize("heads", [[4], "8", ["a", "b"], [0, 4]])
def test_senseless_heads_of_a_folder_are_told(tmp_path, heads):
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    (folder / "unet" / "config.json").write_text(json.dumps({"attention_head_dim": heads}))
    assert "attention_head_dim" in refused(folder, arch=None)


def test_arch_may_not_contradict_the_weights():
    assert "model has 32" in refused(SINGLE, arch=ARCH | {"unet": ARCH["unet"] | {"context_dim": 64}})
    message = refused(SINGLE, arch=ARCH | {"unet": ARCH["unet"] | {"use_linear_projection": True}})
    assert "seems to be a Stable Diffusion 1.x" in message


def test_arch_may_not_contradict_a_folder_of_ours(tmp_path):
    models.save(models.load(FOLDER), tmp_path)
    assert models.load(tmp_path, arch={"image_size": 32, "prediction": "epsilon"}).image_size == 32
    assert "arch.prediction is v, and the model has epsilon" in refused(tmp_path, arch={"prediction": "v"})


def test_another_noise_schedule_is_noticed(state, write):
    alpha_bars = state["alphas_cumprod"].clone()
    models.load(write(state | {"alphas_cumprod": alpha_bars.half()}), arch=ARCH)
    models.load(write(state | {"alphas_cumprod": alpha_bars.bfloat16()}), arch=ARCH)
    for wrong in (0.0, float("nan")):  # zero terminal SNR, and nonsense
        alpha_bars[-1] = wrong
        assert "another noise schedule" in refused(write(state | {"alphas_cumprod": alpha_bars}))


# Files that are no Stable Diffusion


def test_keys_are_named_and_counted(state, write):
    key = "model.diffusion_model.time_embed.0.bias"
    less = {k: t for k, t in state.items() if k != key}
    assert "time_embed.0.bias is missing" in refused(write(less))
    assert "surprise.weight is unexpected" in refused(write(state | {"surprise.weight": torch.ones(3)}))
    misshapen = refused(write(state | {key: torch.zeros(7)}))
    assert "time_embed.0.bias is (7,) where (128,) fits" in misshapen
    several = {k: t for k, t in state.items() if ".norm3." not in k}
    lost = len(state) - len(several)
    message = refused(write(several))
    assert message.count("is missing") == 3 and message.endswith(f"and {lost - 3} more")
    half = {k: t for k, t in state.items() if not k.endswith("input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight")}
    assert "the k beside model.diffusion_model.input_blocks.1.1" in refused(write(half))


@pytest.mark.parametrize(
    "keys, words",
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "LoRA"),
        (["unet.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight"], "LoRA"),
        (["conditioner.embedders.0.transformer.x", "model.diffusion_model.x", "first_stage_model.x"], "SDXL"),
        (["model.diffusion_model.joint_blocks.0.context_block.x"], "SD3"),
        (["control_model.input_blocks.0.0.weight"], "ControlNet"),
        (["string_to_param"], "textual inversion"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "folder above"),
        (["text_model.encoder.layers.0.x"], "folder above"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "autoencoder alone"),
        (["bert.embeddings.weight"], "no Stable Diffusion"),
        (["model.diffusion_model.out.2.weight"], "no weights of the autoencoder and the text"),
        ([], "no tensors"),
    ],
)
def test_foreign_tensors_are_named(write, keys, words):
    assert words in refused(write({key: torch.zeros(2) for key in keys}))


def test_weights_under_two_names_are_refused(state, write):
    prefix = "cond_stage_model.transformer."
    bare = {k.replace("text_model.", ""): t.clone() for k, t in state.items() if k.startswith(prefix)}
    assert "comes twice" in refused(write(state | bare))
    rest = {k: t for k, t in state.items() if not k.startswith(prefix)}
    same(models.load(write(rest | bare), arch=ARCH), models.load(SINGLE, arch=ARCH))  # either name alone will do


def test_a_whole_model_with_a_stray_key_is_not_taken_for_a_lora(state, write):
    assert "lora_up is unexpected" in refused(write(state | {"x.lora_up": torch.ones(2)}))


def test_quantised_weights_are_refused(state, write):
    key = "model.diffusion_model.out.2.weight"
    assert "torch.int8 where torch.float32 fits" in refused(write(state | {key: state[key].to(torch.int8)}))


def test_models_with_other_inputs_are_named(state, write):
    for channels, kind in ((9, "inpainting"), (5, "depth"), (11, "another kind")):
        first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, channels, 3, 3)}
        assert kind in refused(write(state | first), arch=ARCH)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><head></head></html>", "web page"),
        ("Gewichte für später, mit Umlauten und über sechzig Zeichen lang".encode(), "text file"),
        (b"GGUF\x03\x00\x00\x00" + bytes(80), "GGUF"),
        (os.urandom(4) + bytes(200), "damaged or no weight file"),
        (b"PK\x03\x04" + bytes(300), "cut short or no PyTorch file"),
        (b"\x80\x02}q\x00.", "no PyTorch file"),
        ((60).to_bytes(8, "little") + b"{" + b" " * 58 + b"}", "no tensors"),
        ((60).to_bytes(8, "little") + b"{" + b" " * 40, "cut short"),
    ],
)
def test_foreign_files_are_named(tmp_path, content, words):
    (tmp_path / "weights.safetensors").write_bytes(content)
    assert words in refused(tmp_path / "weights.safetensors")


def test_a_pickle_of_something_else_is_named(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "model.ckpt")
    assert "holds a list" in refused(tmp_path / "model.ckpt")
    torch.save({"epoch": 3, "model": {}}, tmp_path / "model.ckpt")
    assert "no tensors by name, but epoch, model" in refused(tmp_path / "model.ckpt")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_truncated_files_are_named(state, tmp_path, suffix, share):
    file = tmp_path / f"model.{suffix}"
    if suffix == "ckpt":
        torch.save(state, file)
    else:
        shutil.copy(SINGLE, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    assert "cut short" in refused(file)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    for zipped, protocol in ((True, 2), (True, 4), (False, 2)):
        torch.save({"state_dict": {"a": torch.zeros(2)}, "callbacks": Trap()}, tmp_path / "model.ckpt",
                   _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)  # fmt: skip
        message = refused(tmp_path / "model.ckpt")
        assert "run code" in message and ".safetensors" in message
        assert "io.open" in message or (zipped, protocol) != (True, 2)
    assert not (tmp_path / "sprung").exists()


def test_folders_that_lack_something_are_named(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").symlink_to("/nowhere/blob")
    assert "unet/ has no complete weights" in refused(folder, arch=None)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copy(FOLDER / "unet" / "diffusion_pytorch_model.safetensors", folder / "unet")
    (folder / "unet" / "config.json").write_text("{")
    assert "is not JSON" in refused(folder, arch=None)
    (folder / "unet" / "config.json").write_text('{"attention_head_dim": 4, "addition_embed_type": "text_time"}')
    assert "addition_embed_type=text_time" in refused(folder, arch=None)
    (folder / "text_encoder_2").mkdir()
    assert "SDXL" in refused(folder, arch=None)
    shutil.rmtree(folder / "text_encoder_2")
    shutil.rmtree(folder / "vae")
    assert "vae" in refused(folder, arch=None)


# Lean and fast


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_weights_stay_in_the_file_until_they_are_changed(tmp_path):
    models.save(models.load(FOLDER), tmp_path / "own", dtype=None)
    before = (tmp_path / "own" / "unet.safetensors").read_bytes()
    model = models.load(tmp_path / "own")
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "own" / "unet.safetensors") in mapped
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert (tmp_path / "own" / "unet.safetensors").read_bytes() == before


def test_loading_draws_no_random_weights():
    before = torch.get_rng_state()
    model = models.load(FOLDER)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


def test_a_mapping_is_dropped_once_much_of_it_was_touched(monkeypatch):
    """Else the pages of the file count as memory beside what was made of them."""
    maps = []
    monkeypatch.setattr("models.checkpoints.read_tensors", lambda files: maps.append(files) or read_tensors(files))
    models.load(FOLDER, dtype=torch.float32)  # stored in half precision, so all of it is converted
    few = len(maps)
    monkeypatch.setattr("models.checkpoints.CHUNK", 500_000)
    models.load(FOLDER, dtype=torch.float32)
    size = sum(file.stat().st_size for file in FOLDER.glob("*/*.safetensors"))
    assert len(maps) - 2 * few >= size // 600_000  # each of the three networks rounds down


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision(dtype, monkeypatch):
    monkeypatch.setattr("models.checkpoints.CHUNK", 500_000)  # several steps, each with a new mapping
    model = models.load(FOLDER, dtype=dtype)
    exact = models.load(SINGLE, arch=ARCH)
    for name, p in model.named_parameters():
        assert torch.equal(p, exact.get_parameter(name).to(dtype)), name


# Prompts


def test_prompts_become_the_known_ids():
    """The ids that CLIP's published vocabulary gives this prompt, and the padding of 1.x and of 2.x."""
    sizes = {"width": 32, "heads": 2, "layers": 1}
    cat = [49406, 320, 1125, 539, 320, 2368, 49407]  # a photo of a cat
    for pad in (49407, 0):
        text = models.text.build_text(**sizes, pad_token=pad)
        ids = text.tokenize(["a photo of a cat", ""])
        assert ids.tolist() == [cat + [pad] * 70, [49406, 49407] + [pad] * 75]
        long = pytest.warns(UserWarning, match="cut to 75")
        with long:
            ids = text.tokenize(["cat " * 100])
        assert ids[0].tolist() == [49406, *[2368] * 75, 49407]


@pytest.mark.parametrize("name, pad", [("sd1_tiny", 599), ("sd2_tiny", 0)])
def test_a_miniature_vocabulary_reads_real_prompts(name, pad):
    arch = {"sd1_tiny": ARCH, "sd2_tiny": ARCH2}[name]
    text = models.load(FIXTURES / name / "model.safetensors", arch=arch).text
    expected = np.load(FIXTURES / name / "expected.npz")["token_ids"]
    ids = text.tokenize(["a photo of a cat", ""])
    assert ids[1].tolist() == expected[1].tolist()  # the empty prompt of the independent implementation
    assert ids[0, 0] == 598 and ids[0, -1] == pad and ids.max() == 599
    tokens = ids[0].tolist()[1 : ids[0].tolist().index(599)]
    assert text._tokenizer.decode(tokens).strip() == "a photo of a cat"


def test_rows_beyond_the_vocabulary_are_no_words(tmp_path):
    """As textual inversion leaves them: begin, end and padding stay CLIP's."""
    text = models.text.build_text(width=32, heads=2, layers=1, vocab_size=49410, pad_token=49407)
    assert text.tokenize(["a cat"])[0, :6].tolist() == [49406, 320, 2368, 49407, 49407, 49407]


@pytest.mark.parametrize("layers, hidden", [(24, "penultimate"), (23, "last")])
def test_a_text_tower_without_the_layer_that_does_not_count(layers, hidden):
    """Converters from the folder layout write 2.x with 23 layers, of which the last one conditions."""
    arch = {
        "unet": {"context_dim": 1024, "use_linear_projection": True, "num_head_channels": 64},
        "vae": {},
        "text": {"width": 1024, "heads": 16, "layers": layers, "vocab_size": 49410},
        "schedule": {},
    }
    model = models.build(arch, meta=True)
    parts = ("unet", "autoencoder", "text")
    told = architecture({part: {k: [t] for k, t in getattr(model, part).state_dict().items()} for part in parts})
    assert (told["text"]["layers"], told["text"]["hidden_layer"]) == (layers, hidden)


def test_recognition_of_the_sizes_as_published():
    """Every size of Stable Diffusion 1.5 and 2.1, from weights of those shapes without contents."""
    for linear, context in ((False, 768), (True, 1024)):
        first = not linear
        arch = {
            "unet": {"context_dim": context, "use_linear_projection": linear}
            | ({"num_heads": 8} if first else {"num_head_channels": 64}),
            "vae": {},
            "text": {"width": context, "heads": context // 64, "layers": 12 if first else 24},
            "schedule": {},
        }
        model = models.build(arch, meta=True)
        pieces = {
            part: {name: [tensor] for name, tensor in getattr(model, part).state_dict().items()}
            for part in ("unet", "autoencoder", "text")
        }
        told = architecture(pieces)
        assert told["unet"] == {
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "channel_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "transformer_depth": 1,
            **arch["unet"],
        }
        assert told["vae"] == {
            "ch": 128,
            "ch_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "z_channels": 4,
            "scale_factor": 0.18215,
        }
        assert told["text"] == arch["text"] | {
            "vocab_size": 49408,
            "context_length": 77,
            "quick_gelu": first,
            "hidden_layer": "last" if first else "penultimate",
            "pad_token": 49407 if first else 0,
        }
        assert ("prediction" in told) == first


def test_read_tensors_joins_shards(tmp_path, write):
    a, b = write({"a": torch.ones(2)}, "1.safetensors"), write({"b": torch.zeros(3)}, "2.safetensors")
    assert {name: t.shape for name, t in read_tensors([a, b]).items()} == {"a": (2,), "b": (3,)}
