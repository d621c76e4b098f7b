"""The families of models on tiny checkpoints: recorded outputs of an independent implementation, sizes, every method.

The weights were rounded to half precision before the outputs were computed in float32, so 1e-4 is rounding only.
"""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

import edit as command
import models
from errors import InputError
from evaluation import config
from models.attention import why_not_fused
from models.names import FAMILIES
from samplers import Conditioning, ddim, guided
from tests.conftest import FIXTURES, close, compose, hub_folder, same, tiny

SCALES = {"sdxl_tiny": (0.13025, 0), "sd3_tiny": (1.5305, 0.0609)}  # of latents, and their shift


@pytest.fixture(scope="module", params=["sd1_tiny", "sd2_tiny", "sdxl_tiny", "sd3_tiny"])
def case(request):
    """(name, model, recorded outputs)."""
    expected = {k: torch.from_numpy(v) for k, v in np.load(FIXTURES / request.param / "expected.npz").items()}
    return request.param, tiny(request.param), expected


def text_of(expected, t5=False):
    """The recorded text, of Stable Diffusion 3 with the states of T5 or with zeros in their place."""
    states = expected.get("text_hidden", expected.get("text_hidden_no_t5"))[:, :77]
    if "t5_hidden" in expected:
        states = torch.cat([states, expected["t5_hidden"] * t5], dim=1)
    return Conditioning(states, expected.get("pooled"))


def networks(expected, t5=False):
    """The network's arguments but for the text's projection, and its raw output."""
    raw = [expected[key] for key in ("eps", "v", "v_t5" if t5 else "v_no_t5") if key in expected]
    pixels = expected["size_ids"][0, :2].tolist() if "size_ids" in expected else None
    return expected["x"], expected["t"], pixels, *raw


def test_text_states_and_vector(case):
    _, model, expected = case
    ids = [expected[name] for name in ("token_ids", "token_ids_1", "token_ids_2") if name in expected]
    towers = [tower for name, tower in model.towers.items() if name != "t5"]
    given = [tower.condition(own) for tower, own in zip(towers, ids, strict=True)]
    states = torch.cat([each.states for each in given], dim=-1)
    close(states, text_of(expected).states[:, :77, : states.shape[-1]])
    vectors = [each.vector for each in given if each.vector is not None]
    assert ("pooled" in expected) == bool(vectors)
    if vectors:
        close(torch.cat(vectors, dim=-1), expected["pooled"])
    if "t5" in model.towers:
        close(model.towers["t5"].encode_tokens(expected["token_ids_3"]), expected["t5_hidden"])
    for tower, own in zip(towers, ids, strict=True):
        assert tower.tokenize([""]).tolist() == own[1:].tolist()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_autoencoder(case, layout):
    name, model, expected = case
    model = copy.deepcopy(model).to(memory_format=layout)
    mean, logvar = model.autoencoder.posterior(expected["image"])
    close(mean, expected["latent_mean"])
    close(logvar, expected["latent_logvar"])
    scale, shift = SCALES.get(name, (0.18215, 0))
    z = (expected["latent_mean"] - shift) * scale
    close(model.encode_image(expected["image"]), z)
    close(model.decode_latents(z.double()), expected["decoded"])


@pytest.mark.parametrize("backend", ["auto", "auto channels last", "sdpa", "reference", "fused"])
def test_network(case, backend):
    _, model, expected = case
    if backend == "fused" and (reason := why_not_fused(model.device)):
        pytest.skip(reason)
    network = copy.deepcopy(model.unet)
    if "last" in backend:
        network.to(memory_format=torch.channels_last)
    network.attention.backend = backend.split()[0]
    for t5 in {False, "t5" in model.towers and backend != "fused"}:
        text, (x, t, pixels, raw) = text_of(expected, t5), networks(expected, t5)
        for learns in (False, True):  # other products are chosen where a CPU learns
            network.requires_grad_(learns)
            close(network(x, t, network.project_context(text.states, text.vector), pixels), raw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(case, dtype):
    """Some dozens of layers, each rounding by eps / 2 of its output."""
    _, model, expected = case
    network, (x, t, pixels, raw) = copy.deepcopy(model.unet).to(dtype), networks(expected)
    text = text_of(expected).map(lambda x: x.to(dtype))
    found = network(x.to(dtype), t, network.project_context(text.states, text.vector), pixels).float()
    assert (found - raw).norm() < 4 * torch.finfo(dtype).eps * raw.norm()


def test_guided_trajectories(case):
    """SDXL's under zeros, which are its empty prompt, and under the encoded one; SD3's with T5 and without."""
    _, model, expected = case
    trajectory = model.schedule.trajectory(steps=10)
    close(trajectory.timesteps.float(), expected.get("ddim_timesteps", expected.get("flow_timesteps")).float(), 1e-3)
    if "flow_sigmas" in expected:
        close(trajectory.levels.float(), expected["flow_sigmas"], 1e-6)
    for key, wanted in expected.items():
        if key.endswith("_trajectory"):
            path, text = [wanted[:1]], text_of(expected, t5="cfg3_t5" in key)
            null = model.encode_text([""]) if "zeros" in key else text[1]
            keep = lambda i, x, path=path: path.append(x)
            ddim.sample(guided(model, text[0], 3.0, null), path[0], trajectory, callback=keep)
            close(torch.cat(path), wanted)


SD3_TEXTS = 83_819_683, 123_060_480, 694_659_840, 4_762_310_656
PUBLISHED = [  # numbers of parameters on the hub, in the order of FAMILIES: network, autoencoder, text towers
    (859_520_964, 83_653_863, 123_060_480),
    (865_910_724, 83_653_863, 340_387_840),
    (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
    (2_243_171_520, *SD3_TEXTS),
    (8_056_627_520, *SD3_TEXTS),
    (2_028_328_000, *SD3_TEXTS),
]


@pytest.mark.parametrize("sizes, published", zip(FAMILIES.values(), PUBLISHED, strict=True))
def test_named_sizes_have_the_published_numbers_of_parameters(sizes, published):
    more = {"t5": {}} if "mmdit" in sizes else {"prediction": "v"}
    model = models.build({"schedule": {}} | more | sizes, meta=True)
    parts = model.unet, model.autoencoder, *model.towers.values()
    assert tuple(sum(p.numel() for p in part.parameters()) for part in parts) == published


@pytest.fixture(scope="module", params=["sdxl_tiny", "sd3_tiny"])
def folder(request, tmp_path_factory, spiece):
    """(name, folder in the hub's layout). Some networks of SD3 come in two files."""
    path = hub_folder(tmp_path_factory.mktemp("hub"), name=request.param)
    for file in [*path.glob("transformer/*.safetensors"), *path.glob("text_encoder_3/*.safetensors")]:
        tensors = sorted(load_file(file).items())
        for i in (0, 1):
            save_file(dict(tensors[i::2]), file.with_name(f"{file.stem}-0000{i + 1}-of-00002.safetensors"))
        file.unlink()
    (path / "tokenizer_3").mkdir()
    (path / "tokenizer_3" / "spiece.model").write_bytes(spiece.read_bytes())
    return request.param, path


def test_both_layouts_and_a_saved_folder_are_one_model(folder, tmp_path, spiece):
    name, path = folder
    single, hub = tiny(name), models.load(path)
    models.save(hub, tmp_path, dtype=None)
    own = models.load(tmp_path, tokenizer=spiece if name == "sd3_tiny" else None)
    for other in (hub, own):
        same(other, single)
        for fact in ("image_size", "prediction", "schedule", "latent_shape"):
            assert getattr(other, fact) == getattr(single, fact)
        assert other.towers.zeros == (name == "sdxl_tiny")
    close(own.encode_text(["a red heart"]).states, hub.encode_text(["a red heart"]).states)


def test_every_method_edits_with_it_or_says_in_one_line_why_not(folder, tmp_path):
    """As `python edit.py model=sdxl`, with its presets; not square, and as large as the folder says, not 1024."""
    name, path = folder
    model = ["model=sdxl", "model.arch.unet.context_dim=80"] if name == "sdxl_tiny" else ["model=sd35_medium"]
    cases = [[f"method={choice.name}"] for choice in config.choices() if choice.group == "method"]
    cases += [["method=imagic", f"method.tune={tune}"] for tune in ("all", "attention", "lora")]
    cases += [["method=prompt_to_prompt", f"inversion={c.name}"] for c in config.choices() if c.group == "inversion"]
    cases += [["method=sdedit", "sampler.eta=1.0"]]
    cannot = "" if name == "sdxl_tiny" else "ddpm sampler.eta prompt_to_prompt masactrl plug_and_play"
    few = {"imagic": ["method.embedding_steps=1", "method.tuning_steps=1"], "flowedit": ["method.n_max=2"]}
    few["masactrl"] = ["method.start_step=1", "method.start_layer=1"]
    given = [f"model.weights={path}", f"image={tmp_path}/photo.png", "prompt=a cat", "source_prompt=a dog", "fit=keep",
             "sampler.steps=3", "cache.enabled=false", "logger.mode=disabled"]  # fmt: skip
    Image.effect_noise((96, 64), 50).convert("RGB").save(tmp_path / "photo.png")
    for number, case in enumerate(cases):
        method, out = case[0].removeprefix("method="), tmp_path / str(number)
        cfg = compose("edit", *model, *case, *given, *few.get(method, []))
        refused = any(word in " ".join(case) for word in cannot.split())
        with pytest.raises(InputError, match=r"^[^\n]*(flow model|UNet)[^\n]*$") if refused else nullcontext():
            assert command.edit(cfg, out, OmegaConf.create({"method": method, "family": None}))[1] == 0, case
            (picture,) = out.glob("edits/*.png")
            assert Image.open(picture).size == ((40, 24) if name == "sdxl_tiny" else (20, 12))
