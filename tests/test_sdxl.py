"""SDXL on the miniature: sizes, the empty prompt, every method through `edit.py`, and the files that are in use."""

import copy
import json
import types
from pathlib import Path

import hydra
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import edit as command
import models
from data.tasks import EditTask
from errors import InputError
from evaluation import config
from methods.base import Run
from methods.inversion import NullText
from models.names import FAMILIES
from samplers import NoiseSchedule, Sampler
from tests.conftest import FIXTURES, close, fixture_arch, hub_folder

SINGLE = FIXTURES / "sdxl_tiny" / "model.safetensors"
ARCH = fixture_arch("sdxl_tiny")
UNET, FIRST, SECOND = "model.diffusion_model.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def state():
    return load_file(SINGLE)


@pytest.fixture(scope="module")
def model():
    return models.load(SINGLE, arch=ARCH)


@pytest.fixture
def loaded(tmp_path):
    """A function of tensors: the model in a file of them."""

    def of(tensors, arch=ARCH, name="model", metadata=None, **options):
        file = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file, metadata)
        return models.load(file, arch=arch, **options)

    return of


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def outputs(model):
    text = model.encode_text(["a red heart"])
    return text.states, text.vector, model.predict(noise(1, 4, 16, 16), 500, text)


def test_named_sizes_have_the_published_numbers_of_parameters():
    model = models.build({"schedule": {}} | FAMILIES["conditioner.embedders.1."], meta=True)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.unet, model.autoencoder, model.towers)]
    assert counts == [2_567_463_684, 83_653_863, 123_060_480 + 694_659_840]


def test_both_layouts_and_a_saved_folder_are_one_model(model, tmp_path):
    for again in (models.load(hub_folder(tmp_path / "hub", name="sdxl_tiny")), model):
        models.save(again, tmp_path / "own", dtype=None)
        for other in (again, models.load(tmp_path / "own")):
            found, wanted = other.state_dict(), model.state_dict()
            assert found.keys() == wanted.keys() and all(torch.equal(t, wanted[name]) for name, t in found.items())
            assert other.towers.zeros and other.image_size == 32


@pytest.mark.parametrize("change", [-1, 1])
def test_other_sizes(state, loaded, change):
    """One transformer block more or fewer a level, one layer more or fewer a tower. The oracle is the miniature: a
    block whose last layers are zero changes nothing, whether it is there or not."""
    deep, silent = "transformer_blocks.1.", {}
    for key, tensor in state.items():
        block = deep in key and any(end in key for end in ("to_out.0", "ff.net.2"))
        layer = any(f"{prefix}{n}." in key for prefix, n in (("encoder.layers.", 1), ("resblocks.", 2)))
        layer = layer and any(end in key for end in ("out_proj", "fc2", "c_proj"))
        silent[key] = tensor * 0 if block or layer else tensor
    text = {"text": (FIRST + "text_model.encoder.layers.", 1), "text_2": (SECOND + "transformer.resblocks.", 2)}
    other = dict(silent)
    for key, tensor in silent.items():
        if deep in key:
            other.pop(key) if change < 0 else other.update({key.replace(deep, "transformer_blocks.2."): tensor})
        for prefix, at in text.values():
            if key.startswith(prefix) and (n := int(key.removeprefix(prefix).split(".")[0])) >= at:
                place = n + change
                if change > 0 or n > at:
                    other[key.replace(f"{prefix}{n}.", f"{prefix}{place}.")] = tensor
    arch = copy.deepcopy(ARCH)
    arch["unet"]["transformer_depth"][2] += change
    for section, (prefix, _) in text.items():
        arch[section]["layers"] += change
        if change < 0:
            other = {key: t for key, t in other.items() if not key.startswith(f"{prefix}{arch[section]['layers']}.")}
    for found, wanted in zip(outputs(loaded(other, arch)), outputs(loaded(silent)), strict=True):
        close(found, wanted)


def test_the_sizes_are_those_of_the_picture(model):
    """Height first, in pixels: the latent's side times two here."""
    text, x, t = model.encode_text(["a red heart"]), noise(1, 4, 8, 12), torch.tensor([500])
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
    empty, blank = (
        models.load(folder).encode_text(["", "a"]),
        models.load(folder, arch={"empty_is_zero": True}),
    )
    assert empty.states[0].any() and empty.vector[0].any()
    assert not blank.encode_text(["", "a"]).states[0].any() and blank.encode_text(["a"]).vector.any()


def test_every_method_edits_with_it(tmp_path, monkeypatch):
    """As `python edit.py model=sdxl`, with its presets; not square."""
    folder, clone = hub_folder(tmp_path / "hub", name="sdxl_tiny"), Path(command.__file__).parent
    config.register()
    cases = [[f"method={choice.name}"] for choice in config.choices() if choice.group == "method"]
    cases += [["method=imagic", f"method.tune={tune}"] for tune in ("all", "attention", "lora")]
    cases += [["method=prompt_to_prompt", f"inversion={c.name}"] for c in config.choices() if c.group == "inversion"]
    given = [f"model.weights={folder}", "model.arch.unet.context_dim=80", "model.arch.image_size=32", "fit=keep",
             f"image={tmp_path}/photo.png", "prompt=a cat", "source_prompt=a dog", "sampler.steps=3",
             "cache.enabled=false", "logger.mode=disabled"]  # fmt: skip
    Image.effect_noise((96, 64), 50).convert("RGB").save(tmp_path / "photo.png")
    few = {"imagic": ["method.embedding_steps=1", "method.tuning_steps=1"]}
    with hydra.initialize_config_dir(str(clone / "conf"), version_base="1.3"):
        for number, (method, *own) in enumerate(cases):
            name, out = method.removeprefix("method="), tmp_path / str(number)
            cfg = hydra.compose("edit", ["model=sdxl", method, *given, *own, *few.get(name, [])])
            if name != "flowedit":  # of flow models
                assert command.edit(cfg, out, types.SimpleNamespace(method=name, family=None))[1] == 0, (method, own)
                (picture,) = out.glob("edits/*.png")
                assert Image.open(picture).size == (40, 24)


# Files of the wild


def test_the_autoencoder_is_never_in_float16(state, loaded):
    """An activation beyond 65504, as SDXL's own autoencoder has, is infinite in float16 and NaN after the next norm."""
    key = "first_stage_model.decoder.conv_in.weight"
    model, z = loaded(state | {key: state[key] * 1e4}, dtype=torch.float16), 100 * noise(1, 4, 16, 16)
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
    x, v, path = noise(1, 4).double(), noise(2, 4)[1:].double(), schedule.trajectory(10)
    assert path.timesteps.tolist() == list(range(999, 0, -100))
    eps = schedule.eps_from_v(x, v, 999)
    a = path.alpha_bars[1].sqrt()
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


def test_relatives_are_refused_or_accepted_in_one_line(state, loaded, tmp_path):
    refiner = {key.replace("embedders.1", "embedders.0"): t for key, t in state.items() if not key.startswith(FIRST)}
    stem = f"{UNET}input_blocks.0.0.weight"
    for word, tensors in {
        "refiner": refiner,
        "inpainting": state | {stem: torch.cat([state[stem], state[stem], state[stem][:, :1]], dim=1)},
        "LoRA": {"lora_unet_input_blocks_4.lora_up.weight": torch.zeros(2), **state},
    }.items():
        with pytest.raises(InputError, match=word) as error:
            loaded(tensors)
        assert "\n" not in str(error.value)
    folder = hub_folder(tmp_path / "refiner", name="sdxl_tiny")
    (folder / "text_encoder").rename(tmp_path / "gone")
    with pytest.raises(InputError, match="refiner"):
        models.load(folder)
    for name in ("sd_xl_turbo_1.0_fp16", "SDXL_Lightning_4step"):
        with pytest.warns(UserWarning, match="few steps") as said:
            loaded(state, name=name)
        assert len(said) == 1
