"""SDXL on the miniature: sizes, the empty prompt, and the files that are in use; see test_families.py."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file

import models
from data.tasks import EditTask
from errors import InputError
from methods.base import Run
from methods.null_text import NullText
from models.names import FAMILIES
from samplers import NoiseSchedule, Sampler
from tests.conftest import FIXTURES, close, fixture_arch, hub_folder, normal, tiny

SINGLE = FIXTURES / "sdxl_tiny" / "model.safetensors"
ARCH = fixture_arch("sdxl_tiny")
FIRST, SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def state():
    return load_file(SINGLE)


@pytest.fixture(scope="module")
def model():
    return tiny("sdxl_tiny")


@pytest.fixture
def loaded(write):
    """A function of tensors: the model in a file of them."""
    return lambda state, arch=ARCH, dtype=torch.float32, **of: models.load(write(state, **of), arch=arch, dtype=dtype)


def outputs(model):
    text = model.encode_text(["a red heart"])
    return text.states, text.vector, model.predict(normal(1, 4, 16, 16).float(), 500, text)


@pytest.mark.parametrize("change", [-1, 1])
def test_other_sizes(state, loaded, change):
    """One transformer block more or fewer a level, one layer more or fewer a tower. The oracle is the miniature: a
    block whose last layers are zero changes nothing, whether it is there or not."""
    blocks = r"(.*\.(?:transformer_blocks|encoder\.layers|resblocks)\.)(\d+)(\..*)"
    last, silent, other = ("to_out.0.", "ff.net.2.", "out_proj.", "fc2.", "c_proj."), {}, {}
    for key, tensor in state.items():
        at, match = 2 if key.startswith(SECOND) else 1, re.fullmatch(blocks, key)
        stem, n, rest = (match[1], int(match[2]), match[3]) if match else (key, -1, "")
        silent[key] = tensor * 0 if n == at and any(end in rest for end in last) else tensor
        kept = [] if change < 0 and n == at else [n, n + 1] if n == at else [n + change if n > at else n]
        other |= {f"{stem}{place}{rest}" if match else key: silent[key] for place in kept}
    arch = copy.deepcopy(ARCH)
    arch["unet"]["transformer_depth"][2] += change
    for tower in ("text", "text_2"):
        arch[tower]["layers"] += change
    for found, wanted in zip(outputs(loaded(other, arch)), outputs(loaded(silent)), strict=True):
        close(found, wanted)


def test_the_sizes_are_those_of_the_picture(model):
    """Height first, in pixels: the latent's side times two here."""
    text, x, t = model.encode_text(["a red heart"]), normal(1, 4, 8, 12).float(), torch.tensor([500])
    project = lambda: model.unet.project_context(text.states, text.vector)
    assert torch.equal(model.predict(x, 500, text), model.unet(x, t, project(), (16, 24)))
    assert not torch.allclose(model.predict(x, 500, text), model.unet(x, t, project(), (24, 16)), atol=1e-4)
    assert model.predict(torch.cat([x, x]), 500, text).shape == (2, 4, 8, 12)


def test_null_text_begins_with_the_zeros_of_the_empty_prompt(model):
    task = EditTask(torch.zeros(1, 3, 32, 32), "a cat", "a red heart")
    z, trajectory = model.encode_image(task.image).double(), Sampler(steps=2).trajectory(model.schedule)
    for steps in (0, 2):
        nulls = NullText(inner_steps=steps, stop_loss=0.0).invert(model, task, z, trajectory, 3.0, Run()).nulls
        assert all(null.vector.shape == (1, 48) and not null.vector.any() for null in nulls)
        assert all(null.states.any() == (steps > 0) for null in nulls)


def test_a_folder_says_whether_the_empty_prompt_is_encoded(tmp_path):
    folder = hub_folder(tmp_path, name="sdxl_tiny")
    (folder / "model_index.json").write_text(json.dumps({"force_zeros_for_empty_prompt": False}))
    empty = models.load(folder).encode_text([""])
    blank = models.load(folder, arch={"empty_is_zero": True}).encode_text(["", "a"])
    assert empty.states.any() and empty.vector.any() and not blank.states[0].any() and blank.vector[1].any()


def test_the_autoencoder_is_never_in_float16(state, loaded):
    """An activation beyond 65504, as SDXL's own autoencoder has, is infinite in float16 and NaN after the next norm."""
    key = "first_stage_model.decoder.conv_in.weight"
    model, z = loaded(state | {key: state[key] * 1e4}, dtype=torch.float16), 100 * normal(1, 4, 16, 16).float()
    assert model.dtype == model.encode_text(["a"]).vector.dtype == torch.float16
    assert model.decode_latents(z).isfinite().all()
    assert not copy.deepcopy(model.autoencoder).half().decode(z.half()).isfinite().all()
    assert {p.dtype for p in loaded(state, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "keys, metadata",
    [(["v_pred"], None), (["v_pred", "ztsnr"], None), ([], "predict_key"), ([], "prediction_type")],
)
def test_a_file_that_says_v_is_believed(state, loaded, keys, metadata, recwarn):
    arch = {name: values for name, values in ARCH.items() if name != "prediction"}
    metadata = metadata and {f"modelspec.{metadata}": "v"}
    model = loaded(state | {key: torch.tensor([]) for key in keys}, arch, metadata=metadata)
    assert model.prediction == "v" and not list(recwarn)
    assert (float(model.schedule.alpha_bars[-1]) == 2**-24) == ("ztsnr" in keys)
    assert model.schedule.trajectory(10).timesteps[0] == (999 if "ztsnr" in keys else 901)
    with pytest.raises(InputError, match="prediction"):
        loaded(state | {key: torch.tensor([]) for key in keys}, arch | {"prediction": "epsilon"}, metadata=metadata)


def test_zero_terminal_snr():
    """Algorithm 1 of Lin et al., written out, and a step from pure noise: x0 = -v, although alpha_bar is near zero."""
    plain, schedule = NoiseSchedule().alpha_bars.sqrt(), NoiseSchedule(zero_snr=True)
    roots = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])
    torch.testing.assert_close(schedule.alpha_bars[:-1], roots[:-1] ** 2, rtol=1e-12, atol=0)
    x, v, path = normal(1, 4), normal(1, 4, seed=1), schedule.trajectory(10)
    assert path.timesteps.tolist() == list(range(999, 0, -100))
    eps = schedule.eps_from_v(x, v, 999)
    a = path.levels[1].sqrt()
    torch.testing.assert_close(path.step(x, eps, 0, 1), -a * v + (1 - a**2).sqrt() * x, atol=1e-3, rtol=0)
    torch.testing.assert_close(path.step(path.step(x, eps, 0, 1), eps, 1, 0), x)
    with pytest.raises(InputError, match="prediction=v"):
        models.build(FAMILIES["conditioner.embedders.1."] | {"schedule": {"zero_snr": True}}, meta=True)


def test_files_of_other_trainers(state, loaded, model, tmp_path):
    """Without position_ids and logit_scale; bigG under the hub's names, where its q, k and v are apart."""
    hub_folder(tmp_path / "hub", name="sdxl_tiny")
    second = load_file(tmp_path / "hub" / "text_encoder_2" / "model.safetensors")
    named = {key: t for key, t in state.items() if not key.startswith(SECOND) and "position_ids" not in key}
    for prefix in ("conditioner.embedders.1.transformer.", SECOND):
        found = loaded(named | {f"{prefix}{key}": tensor for key, tensor in second.items()})
        for mine, theirs in zip(outputs(found), outputs(model), strict=True):
            close(mine, theirs)
