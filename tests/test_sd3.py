"""Stable Diffusion 3 on a tiny checkpoint: recorded outputs of an independent implementation, loading and methods.

The weights were rounded to half precision before the outputs were computed in float32, so 1e-4 is rounding only.
"""

import json
import types
from dataclasses import replace
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from omegaconf import open_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer

import edit as command
import models
from data.tasks import EditTask
from errors import InputError
from methods import flowedit
from methods.base import Run
from methods.direct_inversion import DirectInversion
from methods.flowedit import FlowEdit
from methods.sdedit import SDEdit
from models.attention import why_not_fused
from models.names import FAMILIES
from samplers import Conditioning, Sampler, ddim, guided
from tests.conftest import FIXTURES, close, hub_folder, latents

FOLDER = FIXTURES / "sd3_tiny"
SINGLE, T5 = FOLDER / "model.safetensors", FOLDER / "t5.safetensors"
SIZES = json.loads((FOLDER / "arch.json").read_text())
ARCH = {name: SIZES[name] for name in ("vae", "text", "text_2", "schedule", "image_size")}
ARCH["mmdit"] = SIZES["transformer"]
NAMES = {"d_model": "width", "num_layers": "layers", "num_heads": "heads", "d_kv": "head_width", "d_ff": "hidden"}
WITH_T5 = ARCH | {"t5": {"vocab_size": 128} | {ours: SIZES["t5"][theirs] for theirs, ours in NAMES.items()}}
EXPECTED = {name: torch.from_numpy(value) for name, value in np.load(FOLDER / "expected.npz").items()}


@pytest.fixture(scope="module")
def model():
    return models.load(SINGLE, arch=WITH_T5, text=T5)


@pytest.fixture(scope="module")
def plain():
    with pytest.warns(UserWarning, match="T5"):
        return models.load(SINGLE, arch=ARCH)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A small sentencepiece model with T5's special tokens."""
    file = tmp_path_factory.mktemp("t5") / "spiece.model"
    with open(file, "wb") as out:
        lines = ["a photo of a cat", "a red heart", "the quick brown fox jumps over the lazy dog"]
        special = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, vocab_size=50, hard_vocab_limit=False, **special
        )
    return file


def text_of(model, t5=False):
    """The recorded prompts ("a photo of a cat"-like and the empty one), encoded from their recorded ids."""
    given = [model.towers[name].condition(EXPECTED[f"token_ids_{i}"]) for i, name in ((1, "text"), (2, "text_2"))]
    states = torch.nn.functional.pad(torch.cat([each.states for each in given], -1), (0, 16))
    more = model.towers["t5"].encode_tokens(EXPECTED["token_ids_3"]) if t5 else torch.zeros(2, 256, 96)
    return Conditioning(torch.cat([states, more], dim=1), torch.cat([each.vector for each in given], -1))


@pytest.fixture(scope="module")
def hub(tmp_path_factory, spiece):
    """The same weights as a folder in the hub's layout; some come in two files."""
    folder = hub_folder(tmp_path_factory.mktemp("hub"), name="sd3_tiny")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": 1000, "shift": 3.0}')
    for file in [*folder.glob("transformer/*.safetensors"), *folder.glob("text_encoder_3/*.safetensors")]:
        tensors = sorted(load_file(file).items())
        for i in (0, 1):
            save_file(dict(tensors[i::2]), file.with_name(f"{file.stem}-0000{i + 1}-of-00002.safetensors"))
        file.unlink()
    (folder / "tokenizer_3").mkdir()
    (folder / "tokenizer_3" / "spiece.model").write_bytes(spiece.read_bytes())
    return folder


# Parity


def test_text(model, plain):
    found = text_of(model, t5=True)
    close(found.states[:, :77], EXPECTED["text_hidden_no_t5"][:, :77])
    close(found.states[:, 77:], EXPECTED["t5_hidden"])
    close(found.vector, EXPECTED["pooled"])
    assert model.text.tokenize([""]).equal(EXPECTED["token_ids_1"][1:])
    assert model.towers["text_2"].tokenize([""]).equal(EXPECTED["token_ids_2"][1:])
    again, empty = plain.encode_text([""]), text_of(plain)[1]  # the empty prompt is encoded; T5's place holds zeros
    close(again.states, empty.states)
    close(again.vector, empty.vector)


def test_autoencoder(model):
    mean, logvar = model.autoencoder.posterior(EXPECTED["image"])
    close(mean, EXPECTED["latent_mean"])
    close(logvar, EXPECTED["latent_logvar"])
    close(model.encode_image(EXPECTED["image"]), (EXPECTED["latent_mean"] - 0.0609) * 1.5305)
    close(model.decode_latents((EXPECTED["latent_mean"] - 0.0609) * 1.5305), EXPECTED["decoded"])


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference", "fused"])
def test_network(model, backend, monkeypatch):
    if backend == "fused" and (reason := why_not_fused(model.device)):
        pytest.skip(reason)
    monkeypatch.setattr(model.unet.attention, "backend", backend)
    for t5 in (True,) if backend == "fused" else (False, True):
        text = text_of(model, t5)
        close(model.predict(EXPECTED["x"], EXPECTED["t"], text), EXPECTED["v_t5" if t5 else "v_no_t5"])
    close(model.predict(EXPECTED["x_wide"], float(EXPECTED["t"][0]), text_of(model)[0]), EXPECTED["v_wide"])
    with pytest.raises(InputError, match="13x12"):
        model.predict(torch.zeros(1, 16, 24, 26), 1.0, text[0])


@pytest.mark.parametrize("t5", [False, True])
def test_euler_trajectory_with_guidance(model, t5):
    text, trajectory = text_of(model, t5), model.schedule.trajectory(10)
    close(trajectory.levels.float(), EXPECTED["flow_sigmas"], atol=1e-6)
    close(trajectory.timesteps.float(), EXPECTED["flow_timesteps"], atol=1e-3)
    expected = EXPECTED["euler_cfg3_t5_trajectory" if t5 else "euler_cfg3_no_t5_trajectory"]
    path = [expected[:1]]
    ddim.sample(guided(model, text[0], 3.0, text[1]), path[0], trajectory, callback=lambda i, x: path.append(x))
    close(torch.cat(path), expected)


def test_flowedit_noise_by_noise(model, monkeypatch):
    """The recorded run leads from the empty prompt to the other one, without T5."""
    noises, text, recorded = iter(EXPECTED["flowedit_noises"]), text_of(model), SIZES["flowedit"]
    monkeypatch.setattr(flowedit, "noise_like", lambda x, generator: next(noises).expand_as(x))
    view = types.SimpleNamespace(prediction="flow", schedule=model.schedule, project=model.project)
    view.predict, view.encode_text = model.predict, lambda prompts: text[[0 if prompts[0] else 1]]
    task = types.SimpleNamespace(prompt="cat", source_prompt="", negative_prompt="")
    scales = dict(source_guidance_scale=recorded["guidance_source"], guidance_scale=recorded["guidance_target"])
    method = FlowEdit(Sampler(steps=recorded["steps"]), n_max=recorded["n_max"], **scales)
    (_, edit), _ = method.edit(view, task, EXPECTED["flowedit_source"].double(), Run())
    close(edit.float(), EXPECTED["flowedit_path"][-1:])
    assert next(noises, None) is None


def test_checkpointing_changes_no_gradient_and_every_weight_has_one(plain):
    text, unet, gradients = text_of(plain), plain.unet, []
    try:
        for unet.gradient_checkpointing in (False, True):
            unet.requires_grad_(True).zero_grad()
            unet(EXPECTED["x"], EXPECTED["t"], plain.project(text)).square().sum().backward()
            gradients.append({name: p.grad for name, p in unet.named_parameters()})
    finally:
        unet.requires_grad_(False).gradient_checkpointing = False
    torch.testing.assert_close(*gradients)
    idle = [name for name, gradient in gradients[0].items() if not gradient.any()]
    assert idle == ["joint_blocks.1.context_block.attn.ln_q.weight"]  # nothing reads the text after the last block


# Loading


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_layouts_are_one_model(model, plain, hub, tmp_path, spiece):
    folder = models.load(hub)
    same(folder, model)
    sizes = ("image_size", "prediction", "schedule", "latent_shape")
    assert [getattr(folder, name) for name in sizes] == [getattr(model, name) for name in sizes]
    models.save(folder, tmp_path, dtype=None)
    own = models.load(tmp_path, tokenizer=spiece)
    same(own, model)
    close(own.encode_text(["a red heart"]).states, folder.encode_text(["a red heart"]).states)


def test_text_encoders_come_from_other_files(model, hub, tmp_path):
    tensors = load_file(SINGLE)
    save_file({k: t for k, t in tensors.items() if "text_encoders" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.text"):
        models.load(tmp_path / "model.safetensors", arch=ARCH)
    same(models.load(tmp_path / "model.safetensors", arch=WITH_T5, text=hub), model)
    files = [tmp_path / f"{name}.safetensors" for name in ("clip_l", "clip_g", "t5")]
    for file, part in zip(files, ("text_encoder", "text_encoder_2", "text_encoder_3"), strict=True):
        save_file({k: t for f in (hub / part).glob("*.safetensors") for k, t in load_file(f).items()}, file)
    same(models.load(tmp_path / "model.safetensors", arch=WITH_T5, text=files), model)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    for text in (tmp_path / "none", tmp_path / "other.safetensors"):
        with pytest.raises(InputError, match="no text encoder"):
            models.load(SINGLE, arch=ARCH, text=text)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_with_its_scales(kind, tmp_path):
    """Scaled weights come back to float8's precision, whatever the scale; the decoys beside them change nothing."""
    tensors, eight = load_file(SINGLE), load_file(SINGLE)
    for i, (key, tensor) in enumerate(tensors.items()):
        if key.startswith("model.diffusion_model.") and key.endswith(".weight") and tensor.ndim == 2:
            stem, scale = key.removesuffix("weight"), tensor.abs().max().float() / 300
            eight[key] = (tensor.float() / scale).to(kind)
            eight[stem + ("scale_weight" if i % 2 else "weight_scale")] = scale
            eight[stem + "scale_input"] = torch.tensor(7.0)
    key = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1."
    eight[key + "weight"], eight[key + "scale_weight"] = tensors[key + "weight"].to(kind), torch.empty(0)
    eight["model.diffusion_model.scaled_fp8"] = eight["scaled_fp8"] = torch.empty(0, dtype=kind)
    save_file(eight, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="T5"):
        found, exact = (models.load(file, arch=ARCH) for file in (tmp_path / "model.safetensors", SINGLE))
    digits = 2**-4 if kind is torch.float8_e4m3fn else 2**-3
    for (name, a), b in zip(found.named_parameters(), exact.parameters(), strict=True):
        assert a.dtype == torch.float32 and ((a - b).abs() <= digits * b.abs() + 2e-3 * b.abs().max()).all(), name
    first = found.unet.joint_blocks[0].x_block.mlp[0].weight
    assert not torch.equal(first, exact.unet.joint_blocks[0].x_block.mlp[0].weight)


def test_named_sizes_have_the_published_numbers_of_parameters():
    """Of SD3 medium, 3.5 medium and 3.5 large as published on the hub, and the text towers and autoencoder of each."""
    sizes = [sizes for sizes in FAMILIES.values() if "mmdit" in sizes]
    built = [models.build(each | {"t5": {}}, meta=True) for each in sizes]
    counts = {sum(p.numel() for p in model.unet.parameters()) for model in built}
    assert counts == {2_028_328_000, 2_243_171_520, 8_056_627_520}
    parts = [*built[0].towers.values(), built[0].autoencoder]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [
        123_060_480, 694_659_840, 4_762_310_656, 83_819_683,
    ]  # fmt: skip


def test_half_precision_keeps_t5_out_of_float16(tmp_path):
    for dtype, wide in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        model = models.load(SINGLE, arch=WITH_T5, text=T5, dtype=dtype)
        assert {p.dtype for p in model.towers["t5"].parameters()} == {wide} and model.dtype == dtype


def test_t5_reads_prompts_by_its_sentencepiece_model(model, spiece, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"model\.tokenizer"):
        model.encode_text(["a cat"])
    t5 = models.load(SINGLE, arch=WITH_T5, text=T5, tokenizer=spiece).towers["t5"]
    ids = t5.tokenize(["a red heart", "", "cat " * 300])
    assert t5.tokenizer.decode(ids[0][ids[0] > 1].tolist()) == "a red heart" and ids.shape == (3, 256)
    assert ids[1].tolist() == [1] + [0] * 255 and ids[2, -1] == 1 and (ids[2] > 0).all()
    (tmp_path / "spiece.model").write_text("none")
    with pytest.raises(InputError, match="sentencepiece model"):
        models.load(SINGLE, arch=WITH_T5, text=T5, tokenizer=tmp_path / "spiece.model")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"\[t5\]"):
        models.load(SINGLE, arch=WITH_T5, text=T5, tokenizer=spiece)


# Methods


METHODS = {
    "flowedit": ["method.n_max=3", "method.n_min=1", "method.n_avg=2"],
    "sdedit": [],
    "ddim_inversion": ["method.fixed_point_steps=1"],
    "direct_inversion": ["method.inversion_steps=6"],
    "imagic": ["method.embedding_steps=2", "method.tuning_steps=2", "method.lora_rank=2", "method.start=inversion"],
    "imagic_all": ["method=imagic", "method.tune=all", "method.embedding_steps=1", "method.tuning_steps=1"],
}


def run(folder, spiece, *arguments):
    """`edit.py model=sd35_medium` on the miniature, in this process; its rows."""
    files = f"model.weights={SINGLE}", f"model.text={T5}", f"model.tokenizer={spiece}"
    given = ["image=null", "prompt=a red heart", "source_prompt=a cat", "sampler.steps=4", "logger.mode=disabled"]
    with hydra.initialize_config_dir(str(Path(command.__file__).parent / "conf"), version_base="1.3"):
        cfg = hydra.compose("edit", ["model=sd35_medium", *files, "cache.enabled=false", *given, *arguments])
    with open_dict(cfg):
        cfg.model.arch = WITH_T5
    assert command.edit(cfg, folder, types.SimpleNamespace(method="a method", family=None))[1] == 0
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_for_flows_edits_a_picture(name, spiece, tmp_path):
    (row,) = run(tmp_path, spiece, f"method={name.removesuffix('_all')}", *METHODS[name])
    assert Image.open(tmp_path / row["file"]).size == (16, 16)
    assert row["evaluations"] > 3 and row["edit_source_cosine"] < 1


@pytest.mark.parametrize("name", ["ddpm_inversion", "prompt_to_prompt", "masactrl", "plug_and_play", "sampler"])
def test_what_has_no_meaning_for_it_is_refused_in_one_line(name, spiece, tmp_path):
    method = ["method=sdedit", "sampler.kind=ddpm"] if name == "sampler" else [f"method={name}"]
    with pytest.raises(InputError) as error:
        run(tmp_path, spiece, *method)
    assert "\n" not in str(error.value) and ("flow model" in str(error.value) or "UNet" in str(error.value))


@pytest.fixture
def cat():
    """An edit of a random picture."""
    return EditTask(EXPECTED["image"].clamp(-1, 1), "a red heart", "a cat")


def test_flowedit_returns_the_picture_under_equal_prompts_and_averages_over_noises(plain, tiny_model, cat, edit):
    equal = FlowEdit(Sampler(steps=4), n_max=4, guidance_scale=2.0, source_guidance_scale=2.0)
    ((_, latent, _),), (again, _), _ = edit(equal, plain, replace(cat, prompt="a cat"))
    close(latent, again, atol=1e-6)
    spread = []
    for n_avg in (1, 16):
        method = FlowEdit(Sampler(steps=4), n_max=2, n_avg=n_avg, guidance_scale=2.0, num_samples=6)
        edits, _, _ = edit(method, plain, cat)
        spread.append(latents((edits,)).std(dim=0).mean())
    assert 0 < spread[1] < 0.5 * spread[0]
    with pytest.raises(InputError, match="flow model"):
        edit(equal, tiny_model, cat)
    with pytest.raises(InputError, match="n_max"):
        FlowEdit(Sampler(steps=4))


@pytest.mark.parametrize("method", [FlowEdit, SDEdit, DirectInversion])
def test_a_mask_confines_the_edit(plain, cat, edit, method):
    region = torch.ones(1, 1, 16, 16)
    region[..., 8:] = 0
    method = method(Sampler(steps=4), **{"n_max": 3, "n_min": 1} if method is FlowEdit else {})
    ((_, latent, picture),), _, run = edit(method, plain, replace(cat, region=region))
    z = run.tensors["source_latent"]
    assert torch.equal(latent[..., 4:], z[..., 4:]) and torch.equal(picture[..., 8:], cat.image[0, ..., 8:])
    assert not torch.equal(latent[..., :4], z[..., :4]) and plain.schedule.kept is None


def test_direct_inversion_replays_recorded_velocities(plain, cat, edit):
    ((_, latent, _),), (again, _), run = edit(DirectInversion(Sampler(steps=4), edit_strength=0.0), plain, cat)
    close(latent, run.tensors["source_latent"], atol=1e-9)
    assert run.metrics["replay_error"] < 1e-9 and torch.equal(latent, again)
    with pytest.raises(InputError, match="blend=latent"):
        edit(DirectInversion(Sampler(steps=4), blend="latent"), plain, cat)
