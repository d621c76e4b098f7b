"""Stable Diffusion 3 on a tiny checkpoint: its text encoders, float8, and methods for flows; see test_families.py."""

import json
import types
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from data.tasks import EditTask
from errors import InputError
from methods import flowedit
from methods.base import Run
from methods.direct_inversion import DirectInversion
from methods.flowedit import FlowEdit
from methods.rf_inversion import RFInversion
from methods.sdedit import SDEdit
from samplers import Conditioning, FlowSchedule, Sampler, as_velocity, ddim, guided, noise_like
from tests.conftest import FIXTURES, close, fixture_arch, hub_folder, latents, same, tiny

FOLDER = FIXTURES / "sd3_tiny"
SINGLE, T5 = FOLDER / "model.safetensors", FOLDER / "t5.safetensors"
WITH_T5 = fixture_arch("sd3_tiny")
ARCH = {name: sizes for name, sizes in WITH_T5.items() if name != "t5"}
EXPECTED = {name: torch.from_numpy(value) for name, value in np.load(FOLDER / "expected.npz").items()}
STATES = torch.cat([EXPECTED["text_hidden_no_t5"][:, :77], 0 * EXPECTED["t5_hidden"]], dim=1)
TEXT = Conditioning(STATES, EXPECTED["pooled"])  # of the recorded prompt and of the empty one, without T5


@pytest.fixture(scope="module")
def model():
    return tiny("sd3_tiny")


@pytest.fixture(scope="module")
def plain():
    with pytest.warns(UserWarning, match="T5"):
        return models.load(SINGLE, arch=ARCH)


def test_the_empty_prompt_is_encoded_and_zeros_stand_for_t5(plain):
    found = plain.encode_text([""])
    close(found.states, TEXT[1].states)
    close(found.vector, TEXT[1].vector)


def test_positions_are_cut_from_the_centre(model):
    close(model.predict(EXPECTED["x_wide"], float(EXPECTED["t"][0]), TEXT[0]), EXPECTED["v_wide"])
    with pytest.raises(InputError, match="13x12"):
        model.predict(torch.zeros(1, 16, 24, 26), 1.0, TEXT[0])


def test_flowedit_noise_by_noise(model, monkeypatch):
    """The recorded run leads from the empty prompt to the other one, without T5."""
    noises, recorded = iter(EXPECTED["flowedit_noises"]), json.loads((FOLDER / "arch.json").read_text())["flowedit"]
    monkeypatch.setattr(flowedit, "noise_like", lambda x, generator: next(noises).to(x).expand_as(x))
    view = types.SimpleNamespace(prediction="flow", schedule=model.schedule, project=model.project)
    view.predict, view.encode_text = model.predict, lambda prompts: TEXT[[0 if prompts[0] else 1]]
    task = types.SimpleNamespace(prompt="cat", source_prompt="", negative_prompt="")
    scales = dict(source_guidance_scale=recorded["guidance_source"], guidance_scale=recorded["guidance_target"])
    method = FlowEdit(Sampler(steps=recorded["steps"]), n_max=recorded["n_max"], **scales)
    (_, edit), _ = method.edit(view, task, EXPECTED["flowedit_source"].double(), Run())
    close(edit.float(), EXPECTED["flowedit_path"][-1:])
    assert next(noises, None) is None


def test_checkpointing_changes_no_gradient_and_every_weight_has_one(plain):
    unet, gradients = plain.unet, []
    try:
        for unet.gradient_checkpointing in (False, True):
            unet.requires_grad_(True).zero_grad()
            unet(EXPECTED["x"], EXPECTED["t"], plain.project(TEXT)).square().sum().backward()
            gradients.append({name: p.grad for name, p in unet.named_parameters()})
    finally:
        unet.requires_grad_(False).gradient_checkpointing = False
    torch.testing.assert_close(*gradients)
    idle = [name for name, gradient in gradients[0].items() if not gradient.any()]
    assert idle == ["joint_blocks.1.context_block.attn.ln_q.weight"]  # nothing reads the text after the last block


def test_text_encoders_come_from_other_files(model, tmp_path):
    hub = hub_folder(tmp_path / "hub", name="sd3_tiny")
    tensors = load_file(SINGLE)
    save_file({k: t for k, t in tensors.items() if "text_encoders" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.text"):
        models.load(tmp_path / "model.safetensors", arch=ARCH)
    same(models.load(tmp_path / "model.safetensors", arch=WITH_T5, text=[hub]), model)
    files = [tmp_path / f"{name}.safetensors" for name in ("clip_l", "clip_g", "t5")]
    for file, part in zip(files, ("text_encoder", "text_encoder_2", "text_encoder_3"), strict=True):
        save_file({k: t for f in (hub / part).glob("*.safetensors") for k, t in load_file(f).items()}, file)
    same(models.load(tmp_path / "model.safetensors", arch=WITH_T5, text=files), model)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    for text in (tmp_path / "none", tmp_path / "other.safetensors"):
        with pytest.raises(InputError, match="no text encoder"):
            models.load(SINGLE, arch=ARCH, text=[text])


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_t5_out_of_float16(dtype):
    model = tiny("sd3_tiny", dtype=dtype)
    assert {p.dtype for p in model.towers["t5"].parameters()} == {torch.bfloat16} and model.dtype == dtype


def test_t5_reads_prompts_by_its_sentencepiece_model(model, spiece, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"model\.tokenizer"):
        model.encode_text(["a cat"])
    t5 = tiny("sd3_tiny", tokenizer=spiece).towers["t5"]
    ids = t5.tokenize(["a red heart", "", "cat " * 300])
    assert t5.tokenizer.decode(ids[0][ids[0] > 1].tolist()) == "a red heart" and ids.shape == (3, 256)
    assert ids[1].tolist() == [1] + [0] * 255 and ids[2, -1] == 1 and (ids[2] > 0).all()
    (tmp_path / "spiece.model").write_text("none")
    with pytest.raises(InputError, match="sentencepiece model"):
        tiny("sd3_tiny", tokenizer=tmp_path / "spiece.model")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"\[t5\]"):
        tiny("sd3_tiny", tokenizer=spiece)


@pytest.fixture
def cat():
    """An edit of a random picture."""
    return EditTask(EXPECTED["image"].clamp(-1, 1), "a red heart", "a cat")


def test_flowedit_returns_the_picture_under_equal_prompts_and_averages_over_noises(plain, tiny_model, cat, edit):
    equal = FlowEdit(Sampler(steps=4), n_max=4, guidance_scale=2.0, source_guidance_scale=2.0)
    for model in (plain, tiny_model):
        ((_, latent, _),), (again, _), _ = edit(equal, model, replace(cat, prompt="a cat"))
        close(latent, again, atol=1e-6)
        ((_, latent, _),), _, run = edit(FlowEdit(Sampler(steps=4), n_max=4, n_min=4, guidance_scale=1.0), model, cat)
        flow, z = model.schedule.trajectory(4).as_flow(), run.tensors["source_latent"]
        x = z.lerp(noise_like(z, run.noise("path", 0)), flow.levels[0])
        close(latent, ddim.sample(as_velocity(guided(model, cat.prompt), model.schedule), x, flow), 1e-6)
    spread = []
    for n_avg in (1, 16):
        method = FlowEdit(Sampler(steps=4), n_max=2, n_avg=n_avg, guidance_scale=2.0, num_samples=6)
        edits, _, _ = edit(method, plain, cat)
        spread.append(latents((edits,)).std(dim=0).mean())
    assert 0 < spread[1] < 0.5 * spread[0]
    with pytest.raises(InputError, match="n_max"):
        FlowEdit(Sampler(steps=4))


@pytest.mark.parametrize("method", [FlowEdit, RFInversion, SDEdit, DirectInversion])
def test_a_mask_confines_the_edit(plain, cat, edit, method):
    region = torch.ones(1, 1, 16, 16)
    region[..., 8:] = 0
    method = method(Sampler(steps=4), **{"n_max": 3, "n_min": 1} if method is FlowEdit else {})
    ((_, latent, picture),), _, run = edit(method, plain, replace(cat, region=region))
    z = run.tensors["source_latent"]
    assert torch.equal(latent[..., 4:], z[..., 4:]) and torch.equal(picture[..., 8:], cat.image[0, ..., 8:])
    assert not torch.equal(latent[..., :4], z[..., :4]) and plain.schedule.kept is None


@pytest.mark.parametrize("name", ["plain", "tiny_model"])
def test_rf_inversion_is_plain_or_returns_the_picture(name, request, cat, edit):
    """Without control it is an inversion and plain sampling; controlled in full to the end it is the picture."""
    model, w = request.getfixturevalue(name), RFInversion.guidance_scale
    ((_, latent, _),), (again, _), run = edit(RFInversion(Sampler(steps=4), gamma=0.0, eta=0.0), model, cat)
    flow, z = model.schedule.trajectory(4).as_flow(), run.tensors["source_latent"]
    velocity = lambda prompt, w: as_velocity(guided(model, prompt, w), model.schedule)
    close(latent, ddim.sample(velocity("a red heart", w), ddim.invert(velocity("", 1), z, flow).latent, flow), 1e-5)
    ((_, latent, _),), _, run = edit(RFInversion(Sampler(steps=4), gamma=1.0, eta=1.0, stop=1.0), model, cat)
    close(latent, z, atol=1e-9)
    close(run.tensors["inverted_latent"], z.lerp(noise_like(z, run.noise("y_1", 0)), flow.levels[0]), 1e-9)
    assert torch.equal(again, z)


@pytest.mark.parametrize("start, stop", [(0.0, 1.0), (0.2, 0.6)])
def test_rf_inversion_of_constant_velocities(start, stop):
    """Up, y_1 - Y = (1 - sigma) c + K (1 - sigma)^gamma; down, X - y_0 = sigma c + K sigma^eta, while eta counts.
    Euler's steps multiply the second terms by 1 - gamma h / (1 - sigma), and by 1 - eta h / sigma."""
    velocities, task = {"": 0.3, "cat": -0.8}, types.SimpleNamespace(prompt="cat", negative_prompt="")
    model = types.SimpleNamespace(prediction="flow", schedule=FlowSchedule(), project=lambda text: text.states)
    model.encode_text = lambda prompts: Conditioning(torch.tensor([velocities[p] for p in prompts]).view(-1, 1, 1, 1))
    model.predict = lambda x, t, states: states.double().expand_as(x)
    y_0, method = torch.full((1, 2, 3, 3), 0.4).double(), RFInversion(Sampler(steps=10), 0.5, 0.9, start, stop, 1.0)
    (_, found), _ = method.edit(model, task, y_0, run := Run())
    y_1, sigmas = noise_like(y_0, run.noise("y_1", 0)), FlowSchedule().trajectory(10).levels.tolist()
    rest = y_1 - y_0 - velocities[""]
    for low, high in pairwise(sigmas[::-1]):
        rest = rest * (1 - 0.5 * (high - low) / (1 - low))
    close(run.tensors["inverted_latent"], y_1 - rest, 1e-6)
    rest = y_1 - rest - y_0 - velocities["cat"]
    for n, (high, low) in enumerate(pairwise(sigmas)):
        rest = rest * (1 - 0.9 * (start <= n / 10 < stop) * (high - low) / high)
    close(found, y_0 + rest, 1e-6)


def test_direct_inversion_replays_recorded_velocities(plain, cat, edit):
    ((_, latent, _),), _, run = edit(DirectInversion(Sampler(steps=4), edit_strength=0.0), plain, cat)
    close(latent, run.tensors["source_latent"], atol=1e-9)
    with pytest.raises(InputError, match="blend=latent"):
        edit(DirectInversion(Sampler(steps=4), blend="latent"), plain, cat)
