"""Loading and saving: layouts agree, choices are kept, wrong files are refused in one line."""

import json
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from errors import InputError
from models.checkpoints import SPIECE, weight_files
from models.text import compact_vocabulary
from tests.conftest import FIXTURES, TINY, WEIGHTS, WITHOUT_CLIP, fixture_arch, hub_folder, same, tiny

SINGLE = FIXTURES / "sd1_tiny" / "model.safetensors"
ARCH = fixture_arch("sd1_tiny")
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def state():
    return load_file(SINGLE)


@pytest.fixture(scope="module")
def plain():
    return tiny("sd1_tiny")


def refused(path, arch=ARCH, **options) -> str:
    """The one line with which `load` refuses."""
    with pytest.raises(InputError) as error:
        models.load(path, arch=arch, **options)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("nested, zipped", [(True, True), (False, False)])
def test_pickled_tensors(state, plain, tmp_path, nested, zipped):
    content = {"state_dict": state, "global_step": 3} if nested else state
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    same(models.load(tmp_path / "model.ckpt", arch=ARCH), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_precision_rounds_once(plain, dtype):
    model = models.load(SINGLE, arch=ARCH, dtype=dtype)
    for name, p in model.named_parameters():
        assert torch.equal(p, plain.get_parameter(name).to(dtype)), name


@pytest.mark.parametrize("config", [TINY, WITHOUT_CLIP], ids=["clip", "without"])
def test_a_saved_model_comes_back(tmp_path, config):
    model = models.build(config, seed=0, vocabulary=compact_vocabulary(["a red heart"]))
    models.save(model, tmp_path / "full", dtype=None)
    again = models.load(tmp_path / "full")
    assert again.fingerprint == model.fingerprint and (again.clip is not None) == ("vision" in config)
    assert not any(p.requires_grad or p.is_meta for p in again.parameters())
    models.save(again, tmp_path / "full", dtype=None)  # onto the file that it is mapped to
    assert models.load(tmp_path / "full").fingerprint == again.fingerprint == model.fingerprint
    models.save(model, tmp_path / "half")
    for name, p in models.load(tmp_path / "half").named_parameters():
        torch.testing.assert_close(p, model.get_parameter(name), atol=1e-3, rtol=1e-3)


def test_the_file_does_not_change_with_the_weights_and_no_random_ones_are_drawn(tmp_path):
    models.save(models.build(TINY, seed=0), tmp_path, dtype=None)
    before, drawn = {file: file.read_bytes() for file in tmp_path.glob("*.safetensors")}, torch.get_rng_state()
    model = models.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), drawn)
    for parameter in model.parameters():
        parameter.add_(1)
    assert all(file.read_bytes() == content for file, content in before.items())


def test_averaged_or_plain_weights(state, plain, write):
    unet = [key.removeprefix("model.") for key in state if key.startswith(UNET)]
    averages = {f"model_ema.{key.replace('.', '')}": state[f"model.{key}"] * 2 for key in unet}
    full = write(state | averages | {"model_ema.decay": torch.tensor(0.9999)})
    same(models.load(full, arch=ARCH, ema=False), plain)
    for ema in (None, True):
        averaged = models.load(full, arch=ARCH, ema=ema)
        assert torch.equal(averaged.unet.out[2].weight, 2 * plain.unet.out[2].weight)
        same(averaged.autoencoder, plain.autoencoder)
        same(averaged.text, plain.text)
    assert "ema=false" in refused(SINGLE, ema=True)
    neither = fixture_arch("sd2_tiny") | {"prediction": None}
    assert "prediction" in refused(FIXTURES / "sd2_tiny" / "model.safetensors", neither)  # 2.x files do not say it


def test_a_hub_folder_states_prediction_schedule_and_heads(tmp_path):
    folder = hub_folder(tmp_path / "model")

    def change(file, **values):
        content = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(json.dumps(content))
        return folder

    change("scheduler/scheduler_config.json", prediction_type="v_prediction", beta_start=0.001)
    change("unet/config.json", attention_head_dim=[2, 4], sample_size=None)  # the number of heads, against its name
    model = models.load(change("text_encoder/config.json", hidden_act="gelu"))
    assert model.prediction == "v" and model.text.pad_token == 0 and model.image_size == 768
    assert model.schedule.alpha_bars[0].item() == pytest.approx(1 - 0.001)
    assert [m.heads for m in model.unet.modules() if hasattr(m, "to_kv")] == [2, 2, 4, 2, 2, 2]
    assert "prediction" in refused(folder, arch={"prediction": "epsilon"})
    rescaled = models.load(change("scheduler/scheduler_config.json", rescale_betas_zero_snr=True))
    assert rescaled.schedule.alpha_bars[-1] < 1e-7 < model.schedule.alpha_bars[-1]
    refused(hub_folder(tmp_path / "none", prediction="sample"), arch=None)


def test_clip_scores_do_not_depend_on_the_precision(tiny_model, tmp_path):
    """Nor does the text that conditions a half-precision UNet leave its precision."""
    models.save(tiny_model, tmp_path)
    image, scores = torch.linspace(-1, 1, 4 * 3 * 32**2).view(4, 3, 32, 32), []
    for dtype in (torch.float32, torch.bfloat16):
        model = models.load(tmp_path, dtype=dtype)
        states = model.encode_text(["a cat"]).states
        assert model.dtype == states.dtype == model.unet.out[2].weight.dtype == dtype
        scores.append(model.clip.image_features(image) @ model.clip.text_features(["a cat", "a red heart"]).T)
        assert model.text.pool(states, model.text.tokenize(["a cat"])).isfinite().all()
    torch.testing.assert_close(*scores, atol=1e-3, rtol=0)


def test_foreign_keys_are_left_out_in_one_line(state, plain, write):
    """Those that are known beside the networks say nothing."""
    known = {"v_pred": torch.tensor([]), "model_ema.decay": torch.tensor(0.9), "posterior_variance": torch.ones(2)}
    foreign = {name: torch.ones(1) for name in ("global_step", "embedding_manager.a", "embedding_manager.b")}
    arch = ARCH | {"prediction": "v"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(models.load(write(state | known), arch=arch), plain)
    with pytest.warns(UserWarning, match="left out: embedding_manager, global_step$") as said:
        same(models.load(write(state | known | foreign), arch=arch), plain)
    assert len(said) == 1


@pytest.mark.parametrize("value, options", [(float("nan"), {}), (float("inf"), {}), (1e6, {"dtype": torch.float16})])
def test_weights_that_are_not_finite_are_named(state, write, value, options):
    """Also those that are not in half precision."""
    key = UNET + "middle_block.1.transformer_blocks.0.attn1.to_k.weight"
    file = write(state | {key: torch.full_like(state[key], value, dtype=torch.float32)})
    assert "attn1.to_qkv.weight" in refused(file, **options)
    if options:
        models.load(file, arch=ARCH)


def test_learned_tokens(tmp_path):
    """Two more rows of the embedding, for words that are found as they are, the longer one first."""
    folder = hub_folder(tmp_path)
    file, config = (folder / "text_encoder" / name for name in ("model.safetensors", "config.json"))
    tensors, sizes = load_file(file), json.loads(config.read_text())
    key, n = next(key for key in tensors if key.endswith("token_embedding.weight")), sizes["vocab_size"]
    save_file(tensors | {key: torch.cat([tensors[key], torch.ones(2, sizes["hidden_size"])])}, file)
    config.write_text(json.dumps(sizes | {"vocab_size": n + 2}))
    (folder / "tokenizer").mkdir()
    added = json.dumps({"<toy>": n, "<toy>_1": n + 1, "<|endoftext|>": n - 1})
    (folder / "tokenizer" / "added_tokens.json").write_text(added)
    model = models.load(folder)
    begin, a, end = model.text.tokenize(["a"])[0, :3].tolist()
    assert (begin, end) == (n - 2, n - 1)
    assert model.text.tokenize(["a <toy> a<toy>_1"])[0, :6].tolist() == [begin, a, n, a, n + 1, end]
    models.save(model, tmp_path / "own", dtype=None)
    assert models.load(tmp_path / "own").text.tokenize(["<toy>"])[0, 1] == n
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<toy>": "x", "<toys>": -1}')
    assert "<toy>=x, <toys>=-1" in refused(folder, arch=None)
    ids = model.text.tokenize(["a <toy>"])
    assert torch.equal(model.text.at_end(torch.arange(77.0).view(1, 77, 1), ids), torch.tensor([[3.0]]))


@pytest.mark.parametrize("inside", ["", "unet", "vae", "unet/diffusion_pytorch_model.safetensors"])
def test_a_hub_folder_is_known_by_a_part_of_it(plain, tmp_path, inside):
    folder = models.load(hub_folder(tmp_path) / inside)
    same(plain, folder)
    assert folder.image_size == 16 and folder.prediction == "epsilon"  # sample_size 8, twice that in pixels
    assert folder.text.tokenize(["a cat"]).tolist() == plain.text.tokenize(["a cat"]).tolist()


def test_another_autoencoder(state, plain, write, tmp_path, monkeypatch):
    """In either layout, alone or in a whole model, in the place of one that is there, or is not."""
    monkeypatch.chdir(tmp_path)
    own = {key: t for key, t in state.items() if not key.startswith("first_stage_model.")}
    other = {key.removeprefix("first_stage_model."): 2 * t for key, t in state.items() if key not in own}
    save_file(other | {"loss.logvar": torch.ones(1)}, "vae.safetensors")
    torch.save({f"first_stage_model.{key}": t for key, t in other.items()} | own, "whole.ckpt")
    hub_folder(tmp_path / "hub")
    hub = load_file("hub/vae/diffusion_pytorch_model.safetensors")
    for file in ("hub/vae/diffusion_pytorch_model.safetensors", "renamed.safetensors"):
        save_file({key: 2 * t for key, t in hub.items()}, file)
    assert "model.vae" in refused(write(own))
    for file in ("vae.safetensors", "whole.ckpt", "renamed.safetensors", "hub", "hub/vae"):
        for model in (models.load(SINGLE, arch=ARCH, vae=file), models.load(write(own), arch=ARCH, vae=file)):
            assert torch.equal(model.autoencoder.post_quant_conv.weight, 2 * plain.autoencoder.post_quant_conv.weight)
            same(model.unet, plain.unet)
    file = Path("hub/vae/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.5}))
    assert models.load(SINGLE, arch=ARCH, vae="hub").autoencoder.scale_factor == 0.5
    assert "none" in refused(SINGLE, vae="none")
    assert "autoencoder" in refused(SINGLE, vae=write(own))


STEM, BIAS, KEY = UNET + "input_blocks.0.0.weight", UNET + "time_embed.0.bias", "attn1.to_k.weight"


@pytest.mark.parametrize(
    "change, word",
    [
        ({"unett": {"num_heads": 4}}, "unett"),  # of the sizes
        ({"unet": {"num_heads": 5}}, "heads"),
        ({"unet": {"context_dim": 64}}, "context_dim"),  # as with model=sd15 for weights of 2.x
        ({"prediction": "x0"}, "x0"),
        ({"unet": {"model_channels": -32}}, "negative"),
        ({"vae": {"scale_factor": "wide"}}, "wide"),
        (lambda state: state | {UNET + "surprise": torch.ones(3)}, "surprise is unexpected"),  # of the tensors
        (lambda state: state | {BIAS: torch.zeros(7)}, "[7]"),
        (lambda state: {k: t for k, t in state.items() if not k.endswith(KEY)}, "attn1.to_qkv.weight is missing"),
        (lambda state: state | {STEM: state[STEM].repeat(1, 3, 1, 1)[:, :9]}, "inpainting"),
        (lambda state: state | {"lora_unet_up.weight": torch.zeros(2)}, "LoRA"),
        (lambda state: state | {"conditioner.embedders.0.model.x": torch.zeros(2)}, "refiner"),
        (lambda _: {"conv_in.weight": torch.zeros(2)}, "conv_in.weight"),
    ],
)
def test_what_does_not_fit_is_named(state, write, change, word):
    if callable(change):
        assert word in refused(write(change(state)))
    else:
        arch = {k: ARCH[k] | v if isinstance(v, dict) and k in ARCH else v for k, v in change.items()}
        assert word in refused(SINGLE, arch=ARCH | arch)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_truncated_and_missing_files(state, tmp_path, suffix):
    file = tmp_path / f"model.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, file)
    whole = file.read_bytes()
    for share in (0, 0.01, 0.999):
        file.write_bytes(whole[: int(len(whole) * share)])
        refused(file)
    refused(tmp_path / "none")


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    for zipped in (True, False):
        torch.save({"a": torch.zeros(2), "b": Trap()}, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
        assert "run code" in refused(tmp_path / "m.ckpt")
    assert not (tmp_path / "sprung").exists()


def test_folders_that_do_not_fit(tiny_model, tmp_path):
    own, folder = tmp_path / "own", hub_folder(tmp_path / "hub")
    models.save(tiny_model, own)
    (own / "unet.safetensors").unlink()
    assert "part=unet" in refused(own, arch=None)
    assert "tokenizer" in refused(folder, arch=None, tokenizer="missing.model")
    (folder / "unet" / "config.json").write_text('{"block_out_channels": [0]}')
    assert "sizes" in refused(folder, arch=None)
    (folder / "vae" / "config.json").unlink()
    assert "vae/config.json" in refused(folder, arch=None)


MODEL = "unet/diffusion_pytorch_model"


def test_one_set_of_weights_is_chosen():
    """The averaged ones; full precision before half, safetensors before pickles."""
    others = ["vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "text_encoder/model.safetensors"]
    files = [f"{MODEL}{ending}" for ending in (".non_ema.safetensors", ".fp16.safetensors", ".bin", ".safetensors")]
    for best in (".safetensors", ".bin", ".fp16.safetensors"):
        half = weight_files([*files, *others], half=True)
        assert weight_files([*files, *others]) == half | {"unet": [MODEL + best]}
        assert half == {"unet": [files[1]], "vae": [others[0]], "text_encoder": [others[2]]}
        files.remove(MODEL + best)
    with pytest.raises(InputError, match="unet"):
        weight_files([*files, *others])
    with pytest.raises(InputError, match="refiner"):
        weight_files([f"{MODEL}.bin", others[0], "text_encoder_2/model.safetensors"])


def test_a_hub_id_is_fetched_in_part_and_served_from_the_cache(plain, tmp_path, monkeypatch):
    """From a hub with one repository, in half precision only."""
    asked, files = [], [f"{part}/{name}.fp16.safetensors" for part, name in WEIGHTS.items()]

    def list_repo_files(repo_id, revision):
        if repo_id != "org/name" or revision not in (None, "v1"):
            raise ConnectionError("a line\nand another")
        return [*files, "vae/other.safetensors", "text_encoder/flax_model.msgpack"]

    def snapshot_download(repo_id, revision, allow_patterns=None, local_files_only=False):
        if local_files_only and not asked:
            raise huggingface_hub.errors.LocalEntryNotFoundError("a line\nand another")
        if not local_files_only:
            asked.append(allow_patterns)
            hub_folder(tmp_path, ".fp16.safetensors")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    for name in ("org/none", "org/name@v2"):
        with pytest.raises(InputError, match=rf"^{name} .*auth login[^\n]*$"):
            models.load(name)
    for name in ("org/name@v1", "org/name"):
        same(models.load(name), plain)
    assert asked == [["*.json", SPIECE, *files]]
