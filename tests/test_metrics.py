"""Metrics against closed forms and independent implementations, and reasons for those that are left out."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from data.tasks import EditTask
from errors import InputError
from evaluation.metrics import (
    LOADERS,
    Lpips,
    Metrics,
    StructureDistance,
    change_error,
    clip_directional,
    clip_margin,
    clip_score,
    clip_similarity,
    mse,
    psnr,
    public_clip,
    ssim,
    success,
    success_closer,
)  # fmt: skip


def noise(seed=0, size=32):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Pixels.


def test_psnr_and_mse_in_closed_form():
    a = torch.zeros(1, 3, 32, 32)
    assert psnr(a, a) == 100.0
    assert psnr(a - 1, a + 1) == pytest.approx(0.0, abs=1e-5)  # black against white: the whole range
    assert psnr(a, a + 0.2) == pytest.approx(20.0, abs=1e-4)
    assert mse(a - 1, a + 1) == 1 and mse(a, a + 0.2) == pytest.approx(0.01)
    assert math.isnan(psnr(a * math.nan, a))


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


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_only_the_region_counts(metric):
    a, region = noise(), torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    region[..., :8] = True
    elsewhere = torch.where(region, a, noise(1))
    assert metric(a, elsewhere, region) == metric(a, a, region) > 0.999
    # a quarter is off by 0.2: over the region that is 20 dB, over the whole picture 6 dB more
    assert psnr(a, a + 0.2 * region, region) == pytest.approx(20, abs=1e-4)
    assert psnr(a, a + 0.2 * region) == pytest.approx(20 + 10 * math.log10(4), abs=1e-4)
    assert metric(a, a + 0.2 * region, region) < metric(a, a + 0.2 * region)


# CLIP.


class Compass:
    """A CLIP that sees in a picture the direction of its mean red and green, and reads prompts such as "1 0"."""

    def image_features(self, x):
        return F.normalize(x[:, :2].mean(dim=(2, 3)), dim=-1)

    def text_features(self, prompts):
        return F.normalize(torch.tensor([[float(n) for n in prompt.split()] for prompt in prompts]), dim=-1)


def colour(red, green):
    return torch.tensor([red, green, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)


def test_clip_metrics_in_closed_form():
    clip, half = Compass(), math.sqrt(0.5)
    pictures = torch.cat([colour(1, 1), colour(0, 1)])
    assert clip_score(clip, pictures, ["1 0", "0 3"]).tolist() == pytest.approx([half, 1])
    assert clip_similarity(clip, colour(1, 0), colour(1, 1)).item() == pytest.approx(half)
    assert clip_margin(clip, colour(0, 1), "1 0", "0 1").item() == pytest.approx(1)
    # the picture turns as the text does, the other way, and not at all
    for end, expected in ((colour(0, 1), 1), (colour(-1, 0), half), (colour(0, -1), 0)):
        found = clip_directional(clip, colour(1, 0), end, "1 0", "0 1").item()
        assert found == pytest.approx(expected, abs=1e-6)
    assert math.isnan(clip_directional(clip, colour(1, 0), colour(1, 0), "1 0", "0 1").item())


# Success.


def halves(left, right):
    """A picture 8 pixels wide, the left half of one grey level and the right half of another."""
    return torch.tensor([left] * 4 + [right] * 4).view(1, 1, 1, 8).expand(1, 3, 8, 8)


def test_change_error_in_closed_form():
    """Only the right half is to change, from 0 to 0.8; the left half does not count."""
    source, truth = halves(-0.5, 0.0), halves(-0.5, 0.8)
    for right in (0.0, 0.2, 0.4, 0.8, 1.0):
        for left in (-0.5, 0.9):
            assert change_error(halves(left, right), source, truth) == pytest.approx(abs(0.8 - right) / 0.8, abs=1e-6)
    half_done = torch.where(torch.arange(8).view(8, 1) < 4, truth, source)  # the upper half is right, the lower not
    assert change_error(half_done, source, truth) == pytest.approx(math.sqrt(0.5))
    assert math.isnan(change_error(source, source, source))
    rounding = halves(-0.5 + 2 / 255, 0.8)  # by a grey level, as files round
    assert change_error(halves(-0.5, 0.8), source, rounding) == pytest.approx(0)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (colour(0, 1), True),  # the true result
        (colour(0.4, 0.6), True),
        (colour(0.7, 0.75), False),  # more of the target, but not half of the way
        (colour(1, 0), False),
    ],
)
def test_success_is_an_edit_that_was_done(edit, expected):
    assert success(Compass(), edit, colour(1, 0), colour(0, 1), "1 0", "0 1") == expected
    assert not success(Compass(), edit, colour(1, 0), colour(0, 1), "0 1", "1 0")  # CLIP prefers the source prompt


def test_success_needs_a_change():
    assert math.isnan(success(Compass(), colour(1, 0), colour(1, 0), colour(1, 0), "1 0", "0 1"))


def test_a_small_step_is_closer_and_no_success():
    clip, source, truth = Compass(), colour(1, 0), colour(0, 1)
    step = colour(0.7, 0.75)
    assert success_closer(clip, step, source, truth, "1 0", "0 1")
    assert not success(clip, step, source, truth, "1 0", "0 1")
    # closer in pixels alone, as a blurred input is: CLIP finds the target prompt, but no more of the true result
    assert not success_closer(clip, colour(0.8, -0.1), source, truth, "1 0", "1 -0.1")
    assert not success_closer(clip, colour(-0.9, -0.8), source, truth, "1 0", "0 1")  # further away


def test_success_is_the_same_beside_a_model_in_half_precision(tiny_model, tmp_path):
    """The judging CLIP computes in float32 whatever the model's precision, so close decisions do not turn."""
    models.save(tiny_model, tmp_path / "tiny")
    full, half = (models.load(tmp_path / "tiny", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    task = EditTask(noise(0), "a red heart", "a heart", truth=noise(1))
    for share in torch.linspace(0.4, 1, 13):
        picture = task.image + share * (task.truth - task.image)
        (a, _), (b, _) = (Metrics().measure(model, picture, task) for model in (full, half))
        assert a["clip_margin"] == pytest.approx(b["clip_margin"], abs=1e-5)
        assert a["success"] == b["success"] and a["attainable"] == b["attainable"]


# All of them together.


def measured(model, image=None, **about):
    source = noise(1, 32 if image is None else image.shape[-1])
    return Metrics().measure(model, noise() if image is None else image, EditTask(source, "a red heart", **about))


def test_every_metric_is_there_or_left_out_with_a_reason(tiny_model):
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    full = dict(source_prompt="a heart", mask=mask, truth=noise(2))
    numbers, left_out = measured(tiny_model, **full)
    every = numbers.keys() | left_out.keys()
    core = {f"{name}_to_{to}" for name in ("psnr", "mse", "ssim", "clip_similarity") for to in ("input", "truth")}
    core |= {f"{name}_kept" for name in core} | {"latent_distance_to_input", "latent_distance_to_truth"}
    core |= {"clip_score", "clip_score_edited", "clip_margin", "clip_directional"}
    core |= {"change_error", "success", "success_closer", "attainable"}
    assert set(numbers) == core and all(math.isfinite(value) for value in numbers.values())
    assert all("metrics.fetch=true" in reason for reason in left_out.values())
    for lacking, word in (("mask", "mask"), ("truth", "true result"), ("source_prompt", "source prompt")):
        numbers, left_out = measured(tiny_model, **{name: value for name, value in full.items() if name != lacking})
        assert numbers.keys() | left_out.keys() == every and not numbers.keys() & left_out.keys()
        assert {name for name, why in left_out.items() if word in why}, lacking
        assert ("success" in numbers) == (lacking == "mask")
    left_out = measured(tiny_model, **full | {"mask": torch.ones(1, 1, 32, 32)})[1]
    assert "whole picture" in left_out["ssim_to_input_kept"]
    numbers, left_out = measured(tiny_model, **full | {"mask": torch.zeros(1, 1, 32, 32)})
    assert "clip_score_edited" in left_out
    assert numbers["psnr_to_input_kept"] == pytest.approx(numbers["psnr_to_input"])


def test_the_input_as_the_edit(tiny_model):
    numbers, left_out = measured(tiny_model, noise(1), source_prompt="a heart", truth=noise(2))
    assert numbers["psnr_to_input"] == 100 and numbers["ssim_to_input"] == pytest.approx(1)
    assert numbers["clip_similarity_to_input"] == pytest.approx(1, abs=1e-5)
    assert numbers["latent_distance_to_input"] == pytest.approx(0, abs=1e-6)
    assert (numbers["success"], numbers["change_error"]) == (0, 1) and "0/0" in left_out["clip_directional"]
    read = Metrics().read(tiny_model, noise(1), EditTask(noise(1), "a red heart", "a heart"))
    assert read == {name: pytest.approx(numbers[name], abs=1e-6) for name in ("clip_score", "clip_margin")}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_infinite_picture_is_refused(tiny_model, value):
    image = noise()
    image[0, 0, 3, 4] = value
    with pytest.raises(InputError, match="infinite"):
        measured(tiny_model, image)


def test_a_model_without_clip_has_pixels_and_latents(tiny_model, monkeypatch):
    monkeypatch.setitem(tiny_model._modules, "clip", None)
    numbers, left_out = measured(tiny_model, source_prompt="a heart", truth=noise(2))
    assert {name.split("_to_")[0] for name in numbers} == {"psnr", "mse", "ssim", "latent_distance", "change_error"}
    assert "metrics.fetch" in left_out["clip_score"] and "metrics.fetch" in left_out["success"]
    assert Metrics().read(tiny_model, noise(), EditTask(noise(), "a")) == {}


# Metrics with weights of their own.


def test_a_failed_download_is_left_out_with_the_reason(tiny_model, monkeypatch):
    def no_network(device):
        raise OSError("no route\nto host")

    def not_installed(device):
        raise ModuleNotFoundError("No module named 'torchmetrics'", name="torchmetrics")

    monkeypatch.setitem(LOADERS, "structure_distance", no_network)
    monkeypatch.setitem(LOADERS, "lpips", not_installed)
    numbers, left_out = Metrics(fetch=True).measure(tiny_model, noise(), EditTask(noise(1), "a heart"))
    assert "psnr_to_input" in numbers and "clip_score" in numbers
    assert "no route to host" in left_out["structure_distance_to_input"]
    assert "torchmetrics" in left_out["lpips_to_input"]
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
