"""Stable Diffusion checkpoints of many sizes, in every form they are found in, against an oracle written apart.

The fixtures (outputs of an independent implementation) hold the oracle to account first; then the oracle holds `load`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import stable_diffusion as sd
import torch
from safetensors.torch import load_file

import models
from models.layouts import from_single_file
from models.recognise import architecture

FIXTURES = Path(__file__).parent / "fixtures"
STYLE = {"sd1_tiny": 1, "sd2_tiny": 2}


def close(actual, expected, tolerance=2e-5):
    """Outputs are of order 1, and rounding about 4e-6. (1e-4 would let the tanh form of the GELU pass.)"""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(params=STYLE)
def recorded(request):
    """(single file's state, sizes, style, recorded inputs and outputs) of a fixture."""
    folder = FIXTURES / request.param
    expected = {k: torch.from_numpy(v) for k, v in np.load(folder / "expected.npz").items()}
    sizes = json.loads((folder / "arch.json").read_text())
    return load_file(folder / "model.safetensors"), sizes, STYLE[request.param], expected


def test_oracle_agrees_with_the_recorded_outputs(recorded):
    state, sizes, style, expected = recorded
    w = {k: v.float() for k, v in sd.from_single_file(state, sizes, style).items()}
    close(sd.text_encoder(w, sizes, expected["token_ids"]), expected["text_hidden"])
    mean, logvar = sd.vae_encode(w, expected["image"])
    close(mean, expected["latent_mean"])
    close(logvar, expected["latent_logvar"])
    close(sd.vae_decode(w, mean), expected["decoded"])
    output = sd.unet(w, sizes, expected["x"], expected["t"], expected["text_hidden"])
    close(output, expected["eps" if style == 1 else "v"])


def test_oracle_maps_one_layout_onto_the_other(recorded):
    state, sizes, style, _ = recorded
    folder_layout = sd.from_single_file(state, sizes, style)
    back = sd.to_single_file(folder_layout, sizes, style)
    rest = {k.rsplit(".", 1)[-1] for k in set(state) - set(back)}
    assert rest <= {"betas", "alphas_cumprod", "position_ids", "attn_mask", "logit_scale", "text_projection"}
    assert set(back) <= set(state) and all(torch.equal(back[k], state[k]) for k in back)
    if style == 1:
        stored = {
            f"{file.parent.name}.{k}": v
            for file in (FIXTURES / "sd1_tiny" / "diffusers").glob("*/*.safetensors")
            for k, v in load_file(file).items()
        }
        assert set(stored) == set(folder_layout)
        assert all(torch.equal(stored[k], folder_layout[k]) for k in stored)


@pytest.mark.parametrize("style, parameters", [(1, (859_520_964, 83_653_863, 123_060_480)), (2, (865_910_724,))])
def test_oracle_has_the_published_sizes(style, parameters):
    """Parameter counts as they are published for UNet, autoencoder and text encoder."""
    shapes = sd.shapes(sd.PUBLISHED[style])
    for part, count in zip(("unet", "vae", "text_encoder"), parameters, strict=False):
        assert sum(int(np.prod(s)) for k, s in shapes.items() if k.startswith(f"{part}.")) == count


# ---- what `load` makes of the forms ----------------------------------------------------------------------------------


def sizes_of(style, mults, blocks, heads, vae_mults=(1, 2), vae_blocks=1, layers=2, depth=1, prediction="epsilon"):
    """Stable Diffusion's sizes in miniature. (In 32 channels a group norm would see one channel each, and so take out
    the biases before it and the time embedding.)"""
    unet = {"model_channels": 64, "channel_mult": list(mults), "num_res_blocks": blocks, "context_dim": 48, **heads}
    text = {
        "width": 48,
        "layers": layers,
        "heads": 3,
        "vocab_size": 600,
        "context_length": 77,
        "quick_gelu": style == 1,
    }
    return {
        "unet": unet | ({"transformer_depth": depth} if depth > 1 else {}) | {"use_linear_projection": style == 2},
        "vae": {"ch": 64, "ch_mult": list(vae_mults), "num_res_blocks": vae_blocks, "z_channels": 4},
        "text": text | ({} if style == 1 else {"hidden_layer": "penultimate"}),
        "schedule": {"kind": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timesteps": 1000},
        "prediction": prediction,
    }


@dataclass
class Form:
    """A checkpoint of one size, written in one way: `file` is a single file's name, or "" for the folder layout."""

    style: int
    sizes: dict
    file: str = ""
    dtype: torch.dtype = torch.float32
    averaged: bool = False  # the file holds EMA weights beside the plain ones
    ema: bool | None = None  # what `load` is asked for
    writing: dict = field(default_factory=dict)

    def make(self, folder):
        """Write it -> (path, the weights that count)."""
        plain = sd.make_checkpoint(self.sizes, 0, self.dtype)
        ema = sd.make_checkpoint(self.sizes, 1, self.dtype) if self.averaged else None
        writing = {"dtype": self.dtype, **self.writing}
        if self.file:
            path = sd.write_single_file(folder / self.file, plain, self.sizes, self.style, ema=ema, **writing)
        else:
            path = sd.write_folder(folder, plain, self.sizes, self.style, image_size=64, **writing)
        if ema and self.ema is not False:
            plain |= {k: v for k, v in ema.items() if k.startswith("unet.")}
        return path, plain

    @property
    def arch(self):
        """What the form itself does not tell, at widths that are not Stable Diffusion's own."""
        if not self.file:
            return None
        heads = {k: v for k, v in self.sizes["unet"].items() if k in ("num_heads", "num_head_channels")}
        given = {"unet": heads, "text": {"heads": self.sizes["text"]["heads"]}}
        return given | ({"prediction": self.sizes["prediction"]} if self.style == 2 else {})


BY_NUMBER, BY_WIDTH = {"num_heads": 4}, {"num_head_channels": 16}
HALF, BF16 = torch.float16, torch.bfloat16
FORMS = {
    "1-safetensors": Form(1, sizes_of(1, [1, 2], 1, BY_NUMBER), "model.safetensors"),
    "1-3levels-ckpt-half-ema": Form(1, sizes_of(1, [1, 2, 2], 2, BY_NUMBER), "model.ckpt", HALF, averaged=True),
    "1-ema-asked": Form(1, sizes_of(1, [1, 2], 2, BY_NUMBER), "model.safetensors", averaged=True, ema=True),
    "1-ema-declined": Form(1, sizes_of(1, [1, 2], 1, BY_NUMBER), "model.ckpt", averaged=True, ema=False),
    "1-4levels-pruned": Form(
        1,
        sizes_of(1, [1, 2, 2, 2], 2, BY_NUMBER, vae_mults=(1, 2, 2), vae_blocks=2),
        "model.safetensors",
        BF16,
        writing={"position_ids": False, "buffers": False},
    ),
    "1-heads-by-width": Form(1, sizes_of(1, [1, 2, 3], 1, BY_WIDTH, layers=3), "model.safetensors", HALF),
    "2-4levels-half": Form(
        2, sizes_of(2, [1, 1, 2, 3], 2, BY_WIDTH, vae_mults=(1, 1, 2, 2), prediction="v"), "model.safetensors", HALF
    ),
    "2-heads-by-number": Form(2, sizes_of(2, [1, 2, 3], 1, BY_NUMBER, layers=3), "model.ckpt"),
    "2-ema-bfloat16": Form(2, sizes_of(2, [1, 2], 2, BY_WIDTH, depth=2), "model.ckpt", BF16, averaged=True),
    "1-folder-2022": Form(1, sizes_of(1, [1, 1, 1, 2], 2, BY_NUMBER, vae_mults=(1, 1, 2), vae_blocks=2)),
    "1-folder": Form(1, sizes_of(1, [1, 3], 1, BY_NUMBER), writing={"old_names": False, "position_ids": False}),
    "1-folder-by-width": Form(1, sizes_of(1, [1, 2, 3], 1, BY_WIDTH), dtype=BF16, writing={"old_names": False}),
    "1-folder-fp16": Form(1, sizes_of(1, [1, 2], 2, BY_NUMBER), dtype=HALF, writing={"variant": "fp16"}),
    "1-folder-shards": Form(1, sizes_of(1, [1, 2], 2, BY_NUMBER, vae_mults=(1, 1, 2)), writing={"shards": 3}),
    "2-folder": Form(2, sizes_of(2, [1, 2, 3], 2, BY_WIDTH, layers=3, prediction="v"), writing={"old_names": False}),
    "2-folder-fp16-shards": Form(
        2,
        sizes_of(2, [1, 1, 2, 2], 1, BY_NUMBER, vae_mults=(1, 1, 2, 2), vae_blocks=2, depth=2),
        dtype=HALF,
        writing={"variant": "fp16", "shards": 2},
    ),
}


@pytest.fixture(scope="module", params=FORMS.values(), ids=FORMS)
def loaded(request, tmp_path_factory):
    """(the form, the model that `load` made of it, the weights that the oracle is to use)."""
    path, weights = request.param.make(tmp_path_factory.mktemp("checkpoint"))
    return request.param, models.load(path, arch=request.param.arch, ema=request.param.ema), weights


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_text_states(loaded):
    form, model, weights = loaded
    ids = torch.randint(600, (2, 77), generator=torch.Generator().manual_seed(0))
    close(model.text.encode_tokens(ids), sd.text_encoder(weights, form.sizes, ids))


def test_autoencoder(loaded):
    form, model, weights = loaded
    side = 2 ** len(form.sizes["vae"]["ch_mult"])
    image = noise(1, 3, 2 * side, side).clamp(-1, 1)
    mean, logvar = sd.vae_encode(weights, image)
    for actual, expected in zip(model.autoencoder.posterior(image), (mean, logvar), strict=True):
        close(actual, expected)
    close(model.decode_latents(mean * 0.18215), sd.vae_decode(weights, mean))


def test_unet(loaded):
    form, model, weights = loaded
    side = 2 ** len(form.sizes["unet"]["channel_mult"])  # 2 pixels remain on the last level
    x, context, t = noise(2, 4, side, side // 2), noise(2, 77, 48, seed=1), torch.tensor([3, 871])
    close(model.unet(x, t, context), sd.unet(weights, form.sizes, x, t, context))


def test_sizes_are_recognised(loaded):
    """What the form tells arrives in the config, and with it how the prompt is padded."""
    form, model, _ = loaded
    for section in ("unet", "vae", "text", "schedule"):
        told = {k: v for k, v in form.sizes[section].items() if k not in ("num_heads", "num_head_channels")}
        if not form.file and form.style == 2 and section == "text":  # the folder stores the layers that are used
            told |= {"layers": told["layers"] - 1, "hidden_layer": "last"}
        assert {k: model.config[section].get(k) for k in told} == told
    assert model.prediction == form.sizes["prediction"]
    assert model.text.pad_token == (599 if form.style == 1 else 0)
    if not form.file:
        assert model.image_size == 64


@pytest.mark.parametrize("name, dtype", [("1-ema-asked", HALF), ("2-4levels-half", BF16), ("1-folder-fp16", HALF)])
def test_other_precisions(name, dtype, tmp_path):
    """Asked for in another dtype than it is stored in, or in its own, a weight is what it would be, rounded."""
    form = FORMS[name]
    path, _ = form.make(tmp_path)
    full = models.load(path, arch=form.arch, ema=form.ema).state_dict()
    rounded = models.load(path, arch=form.arch, ema=form.ema, dtype=dtype).state_dict()
    assert set(full) == set(rounded)
    assert all(torch.equal(rounded[k], v.to(dtype) if v.is_floating_point() else v) for k, v in full.items())


@pytest.mark.parametrize("style", [1, 2])
def test_published_models_are_recognised(style):
    """At full width nothing need be said of a single file, but what a 2.x predicts. Tensors without storage do."""
    sizes = sd.PUBLISHED[style]
    weights = {k: torch.empty(shape, device="meta") for k, shape in sd.shapes(sizes).items()}
    pieces, problems = from_single_file(sd.to_single_file(weights, sizes, style), ema=None)
    found = architecture(pieces)
    assert not problems
    for section, expected in sizes.items():
        assert {k: found[section].get(k) for k in expected} == expected
    assert {"num_heads", "num_head_channels"} - set(found["unet"])  # one of them alone
    assert found["unet"]["use_linear_projection"] == (style == 2)
    assert found["text"]["pad_token"] == (49407 if style == 1 else 0)
    assert found.get("prediction") == ("epsilon" if style == 1 else None)


@pytest.mark.parametrize("name", ["1-safetensors", "2-heads-by-number", "2-folder"])
def test_every_weight_matters(name):
    """The comparison above can only fail for a weight that changes an output. (A bias on keys shifts all scores of a
    query alike, which the softmax takes out again; 2.x skips its last text layer.)"""
    sizes = FORMS[name].sizes
    weights = {k: v.requires_grad_() for k, v in sd.make_checkpoint(sizes).items()}
    ids = torch.randint(600, (1, 77), generator=torch.Generator().manual_seed(0))
    context = sd.text_encoder(weights, sizes, ids)
    side = 2 ** len(sizes["unet"]["channel_mult"])
    mean, logvar = sd.vae_encode(weights, noise(1, 3, 8, 8))
    outputs = [context, mean, logvar, sd.vae_decode(weights, mean)]
    outputs.append(sd.unet(weights, sizes, noise(1, 4, side, side), torch.tensor([400]), context))
    sum((x * noise(*x.shape, seed=i)).sum() / x.numel() ** 0.5 for i, x in enumerate(outputs)).backward()
    skipped = f"layers.{sizes['text']['layers'] - 1}." if FORMS[name].style == 2 else "none"
    for key, weight in weights.items():
        if not key.endswith(("k_proj.bias", "to_k.bias")) and skipped not in key:
            assert (weight.grad * weight).norm() > 4e-5, key  # root mean square; `close` looks at the largest
