"""What is measured on an edit: closed forms, an independent implementation, and that nothing is made up where it cannot
be measured."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from data.images import CLONE
from data.tasks import EditTask
from errors import InputError
from metrics import Metrics, fetched, succeeds
from metrics.clip import clip_directional, clip_margin, clip_score, clip_similarity
from metrics.fetched import LOADERS, Lpips, StructureDistance, public_clip
from metrics.pixels import mse, psnr, ssim


def noise(seed=0, size=32, batch=1):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Pixels.


def test_psnr_in_closed_form():
    a = torch.zeros(1, 3, 32, 32)
    assert psnr(a, a) == 100.0
    assert psnr(a - 1, a + 1) == pytest.approx(0.0, abs=1e-5)  # black against white: the whole range
    assert psnr(a, a + 0.2) == pytest.approx(20.0, abs=1e-4)
    assert mse(a - 1, a + 1) == 1 and mse(a, a + 0.2) == pytest.approx(0.01)


def test_ssim_in_closed_form():
    """Of two grey levels only the luminance term is left."""
    a = noise()
    assert ssim(a, a) == pytest.approx(1)
    dark, light = torch.full((1, 3, 16, 20), -0.6), torch.full((1, 3, 16, 20), 0.4)  # 0.2 and 0.7 of white
    assert ssim(dark, light) == pytest.approx((2 * 0.2 * 0.7 + 1e-4) / (0.2**2 + 0.7**2 + 1e-4), abs=1e-6)
    assert ssim(a, -a) < 0


@given(st.integers(0, 99), st.floats(0, 1))
@settings(max_examples=10, deadline=None)
def test_ssim_is_that_of_torchmetrics(seed, amount):
    reference = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    a = F.interpolate(noise(seed, 8), (24, 40), mode="bilinear")
    b = (a + amount * F.interpolate(noise(seed + 1), (24, 40))).clamp(-1, 1)
    expected = reference((a.double() + 1) / 2, (b.double() + 1) / 2, data_range=1.0).item()
    assert ssim(a, b) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("likeness", [psnr, ssim])
def test_only_what_is_kept_counts(likeness):
    a, kept = noise(), torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    kept[..., :8] = True
    elsewhere = torch.where(kept, a, noise(1))
    assert likeness(a, elsewhere, kept) == likeness(a, a, kept) > 0.999
    assert likeness(a, elsewhere) < likeness(a, elsewhere, ~kept) + 10
    # a quarter is off by 0.2: over what is kept that is 20 dB, over the whole picture 6 dB less
    assert psnr(a, a + 0.2 * kept, kept) == pytest.approx(20, abs=1e-4)
    assert psnr(a, a + 0.2 * kept) == pytest.approx(20 + 10 * math.log10(4), abs=1e-4)
    assert likeness(a, a + 0.2 * kept, kept) < likeness(a, a + 0.2 * kept)


# CLIP.


class Compass:
    """A CLIP that sees in a picture the direction of its mean red and green, and reads prompts such as "1 0"."""

    def image_features(self, x):
        return F.normalize(x[:, :2].mean(dim=(2, 3)), dim=-1)

    def text_features(self, prompts):
        return F.normalize(torch.tensor([[float(n) for n in prompt.split()] for prompt in prompts]), dim=-1)


def colour(red, green):
    return torch.tensor([red, green, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)


def test_clip_numbers_in_closed_form():
    clip, half = Compass(), math.sqrt(0.5)
    assert clip_score(clip, torch.cat([colour(1, 1), colour(0, 1)]), ["1 0", "0 3"]).tolist() == pytest.approx(
        [half, 1]
    )
    assert clip_similarity(clip, colour(1, 0), colour(1, 1)).item() == pytest.approx(half)
    assert clip_margin(clip, colour(0, 1), "1 0", "0 1").item() == pytest.approx(1)
    # the picture turns as the text does, the other way, and not at all
    for end, expected in ((colour(0, 1), 1), (colour(-1, 0), half), (colour(0, -1), 0)):
        found = clip_directional(clip, colour(1, 0), end, "1 0", "0 1").item()
        assert found == pytest.approx(expected, abs=1e-6)
    assert math.isnan(clip_directional(clip, colour(1, 0), colour(1, 0), "1 0", "0 1").item())


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (colour(0.1, 0.9), True),
        (colour(1, 0), False),  # the input itself is no closer than the input
        (colour(0.5, 0.4), False),  # closer, but still more of the source
        (colour(-0.9, -0.8), False),  # more of the target, but further away
    ],
)
def test_success_needs_all(edit, expected):
    assert succeeds(Compass(), edit, colour(1, 0), colour(0, 1), "1 0", "0 1") is expected


def test_what_is_closer_in_pixels_alone_is_no_success():
    """As a blurred input is. CLIP finds the target prompt in this one, but no more of the true result."""
    assert not succeeds(Compass(), colour(0.8, -0.1), colour(1, 0), colour(0, 1), "1 0", "1 -0.1")
    assert succeeds(Compass(), colour(0.8, -0.1), colour(1, 0), colour(0, -1), "1 0", "1 -0.1")


# All of them together.


def measured(model, image=None, **about):
    source = noise(1, 32 if image is None else image.shape[-1])
    return Metrics().measure(model, noise() if image is None else image, EditTask(source, "a red heart", **about))


def test_every_number_is_there_or_named_with_a_reason(tiny_model):
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    full = dict(source_prompt="a heart", mask=mask, truth=noise(2))
    numbers, left_out = measured(tiny_model, **full)
    every = numbers.keys() | left_out.keys()
    core = {f"{name}_to_{to}" for name in ("psnr", "mse", "ssim", "clip_similarity") for to in ("input", "truth")}
    core |= {f"{name}_kept" for name in core} | {"latent_distance_to_input", "latent_distance_to_truth"}
    core |= {"clip_score", "clip_score_edited", "clip_margin", "clip_directional", "success", "attainable"}
    assert set(numbers) == core and all(math.isfinite(value) for value in numbers.values())
    assert {why for why in left_out.values()} == {"it needs weights to be fetched: metrics.fetch=true"}
    reasons = {"mask": "no mask", "truth": "no true result", "source_prompt": "no source prompt"}
    for lacking, reason in reasons.items():
        numbers, left_out = measured(tiny_model, **{name: value for name, value in full.items() if name != lacking})
        assert numbers.keys() | left_out.keys() == every and not numbers.keys() & left_out.keys()
        assert {name for name, why in left_out.items() if reason in why}, lacking
        assert ("success" in numbers) == (lacking == "mask")
    left_out = measured(tiny_model, **full | {"mask": torch.ones(1, 1, 32, 32)})[1]
    assert left_out["ssim_to_input_kept"] == "the mask covers the whole picture"
    numbers, left_out = measured(tiny_model, **full | {"mask": torch.zeros(1, 1, 32, 32)})
    assert left_out["clip_score_edited"] == "the mask covers nothing"
    assert numbers["psnr_to_input_kept"] == pytest.approx(numbers["psnr_to_input"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_picture_is_refused(tiny_model, value):
    image = noise()
    image[0, 0, 3, 4] = value
    with pytest.raises(InputError, match="not numbers"):
        measured(tiny_model, image)
    assert math.isnan(psnr(image * math.nan, image))


def test_a_model_without_clip_has_the_pixels_and_the_latents(tiny_model, monkeypatch):
    monkeypatch.setitem(tiny_model._modules, "clip", None)
    numbers, left_out = measured(tiny_model, source_prompt="a heart", truth=noise(2))
    assert {name.split("_to_")[0] for name in numbers} == {"psnr", "mse", "ssim", "latent_distance"}
    assert "metrics.fetch" in left_out["clip_score"] and "metrics.fetch" in left_out["success"]
    assert Metrics().read(tiny_model, noise(), EditTask(noise(), "a")) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_half_precision_is_measured_like_in_float32(dtype):
    """Loading casts what a file holds, and not CLIP's mean and deviation."""
    full = models.load(CLONE / "checkpoints/openmoji64")
    half = models.load(CLONE / "checkpoints/openmoji64", dtype=dtype)
    task = dict(source_prompt="a heart", truth=noise(2, 64), mask=(noise(3, 64)[:, :1] > 0).float())
    (exact, _), (rounded, _) = (measured(model, noise(4, 80)[..., 8:72, 8:72], **task) for model in (full, half))
    assert rounded.keys() == exact.keys() and "clip_directional" in exact
    for name in exact:
        assert rounded[name] == pytest.approx(exact[name], abs=0.03), name
    other_size = noise(5, 48).to(dtype).requires_grad_()
    features = half.clip.image_features(other_size)
    features[0, 0].backward()
    assert features.dtype == torch.float32 and other_size.grad.any()


def test_the_input_handed_back(tiny_model):
    numbers, left_out = measured(tiny_model, noise(1), source_prompt="a heart", truth=noise(2))
    assert numbers["psnr_to_input"] == 100 and numbers["ssim_to_input"] == pytest.approx(1)
    assert numbers["clip_similarity_to_input"] == pytest.approx(1, abs=1e-5)
    assert numbers["latent_distance_to_input"] == pytest.approx(0, abs=1e-6)
    assert numbers["success"] == 0 and "0/0" in left_out["clip_directional"]
    read = Metrics().read(tiny_model, noise(1), EditTask(noise(1), "a red heart", "a heart"))
    assert read == {name: pytest.approx(numbers[name], abs=1e-6) for name in ("clip_score", "clip_margin")}


def test_cost_counts_every_latent_that_the_network_sees(tiny_model):
    from samplers import ddim, guided

    context, null = tiny_model.encode_text(["a cat"]), tiny_model.encode_text([""])
    z, trajectory, before = (
        torch.randn(1, *tiny_model.latent_shape),
        tiny_model.schedule.trajectory(3),
        tiny_model.evaluations,
    )
    ddim.sample(guided(tiny_model, context, null, 1.0), z, trajectory)
    assert tiny_model.evaluations - before == 3
    ddim.sample(guided(tiny_model, context, null, 2.0), z, trajectory)
    assert tiny_model.evaluations - before == 3 + 2 * 3  # guidance asks twice


# What is fetched.


def test_what_cannot_be_fetched_is_left_out_with_the_reason(tiny_model, monkeypatch):
    def no_network(device):
        raise OSError("no route\nto host")

    def not_installed(device):
        raise ModuleNotFoundError("No module named 'torchmetrics'", name="torchmetrics")

    monkeypatch.setitem(LOADERS, "structure_distance", no_network)
    monkeypatch.setitem(LOADERS, "lpips", not_installed)
    fetched.cache_clear()
    numbers, left_out = Metrics(fetch=True).measure(tiny_model, noise(), EditTask(noise(1), "a heart"))
    fetched.cache_clear()
    assert "psnr_to_input" in numbers and "clip_score" in numbers
    assert left_out["structure_distance_to_input"] == "its weights could not be fetched (OSError: no route to host)"
    assert left_out["lpips_to_input"] == "torchmetrics is missing: pip install -e '.[metrics]'"
    with pytest.raises(InputError, match="true or false"):
        Metrics(fetch="yes")


def test_structure_distance_compares_the_keys_of_the_last_layer():
    torch.manual_seed(0)
    distance = StructureDistance(torch.device("cpu"), "vit_tiny_patch16_224", pretrained=False)
    vit, a, b = distance.vit, noise(0, 32), noise(1, 32)

    def expected(image):
        """S_ij = cos(k_i, k_j), head by head, from the layers one after another, of pixels from 0 to 255."""
        image = F.interpolate((image / 2 + 0.5) * 255, (224, 224), mode="bilinear")
        x = (image - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
            3, 1, 1
        )
        tokens = vit.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token, tokens], 1) + vit.pos_embed
        for block in vit.blocks[:-1]:
            x = block(x)
        last = vit.blocks[-1]
        qkv = last.attn.qkv(last.norm1(x)).reshape(x.shape[1], 3, 3, 64)  # tokens, q k v, heads, width
        keys = qkv[:, 1].permute(1, 0, 2)
        dot = sum(k @ k.T for k in keys)
        norm = dot.diag().sqrt()
        return dot / (norm[:, None] * norm)

    with torch.no_grad():
        assert distance(a, b) == pytest.approx(F.mse_loss(expected(a), expected(b)).item(), rel=1e-4)
        large = noise(2, 400)  # reduced, not only enlarged
        assert distance(a, large) == pytest.approx(F.mse_loss(expected(a), expected(large)).item(), rel=1e-4)
        assert distance(a, a) == 0
        assert distance(noise(0, 32)[..., :20], noise(1, 32)[..., :20]) > 0  # not square


def test_lpips_sees_only_what_is_kept(monkeypatch):
    lpip = pytest.importorskip("torchmetrics.functional.image.lpips")
    real = lpip._get_tv_model_features
    monkeypatch.setattr(lpip, "_get_tv_model_features", lambda net, pretrained: real(net, False))
    torch.manual_seed(0)
    distance, a, b = Lpips(torch.device("cpu")), noise(0, 64), noise(1, 64)
    kept = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    kept[..., :32] = True
    with torch.no_grad():
        assert distance(a, a) == 0 and distance(a, b) > 0
        assert distance(a, torch.where(kept, a, b), kept) == 0
        assert distance(a, b, kept) == pytest.approx(distance(torch.where(kept, a, -1), torch.where(kept, b, -1)))


def test_the_public_clip_gives_the_features_that_open_clip_does(monkeypatch):
    import open_clip

    def tiny(name, **asked):
        assert asked["pretrained"] == "openai" and asked["force_custom_text"] and name.endswith("quickgelu")
        vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
        text = {"width": 32, "heads": 2, "layers": 1}
        torch.manual_seed(0)
        return made.setdefault("towers", open_clip.CustomTextCLIP(16, vision, text, quick_gelu=True).eval())

    made = {}
    monkeypatch.setattr(open_clip, "create_model", tiny)
    clip = public_clip(torch.device("cpu"))
    image, towers = noise(0, 32), made["towers"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        expected = towers.encode_image((image / 2 + 0.5 - mean) / std, normalize=True)
        assert torch.allclose(clip.image_features(image), expected, atol=1e-5)
        prompts = ["a photo of a cat", "two dogs"]
        expected = towers.encode_text(open_clip.tokenize(prompts), normalize=True)
        assert torch.allclose(clip.text_features(prompts), expected, atol=1e-5)
