"""Metrics against closed forms and independent implementations, and reasons for those that are left out."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import evaluation.metrics as m
from data.tasks import EditTask


def noise(seed=0, size=32):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Pixels.


def test_psnr_and_mse_in_closed_form():
    a = torch.zeros(1, 3, 32, 32)
    assert m.psnr(a, a) == 100.0
    assert m.psnr(a - 1, a + 1) == pytest.approx(0.0, abs=1e-5)  # black against white: the whole range
    assert m.psnr(a, a + 0.2) == pytest.approx(20.0, abs=1e-4)
    assert m.mse(a - 1, a + 1) == 1 and m.mse(a, a + 0.2) == pytest.approx(0.01)
    assert math.isnan(m.psnr(a * math.nan, a))


def test_ssim_is_that_of_torchmetrics():
    reference = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    a = F.interpolate(noise(0, 8), (24, 40), mode="bilinear")
    b = (a + 0.1 * F.interpolate(noise(1), (24, 40))).clamp(-1, 1)
    expected = reference((a.double() + 1) / 2, (b.double() + 1) / 2, data_range=1.0).item()
    assert m.ssim(a, b) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", [m.psnr, m.ssim])
def test_only_the_region_counts(metric):
    a, region = noise(), torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    region[..., :8] = True
    assert metric(a, torch.where(region, a, noise(1)), region) == metric(a, a, region) > 0.999
    assert metric(a, a + 0.2 * region, region) < metric(a, a + 0.2 * region)
    assert m.psnr(a, a + 0.2 * region, region) == pytest.approx(20, abs=1e-4)


# CLIP.


class Compass:
    """A CLIP that sees in a picture the direction of its mean red and green, and reads prompts such as "1 0"."""

    def image_features(self, x):
        return F.normalize(x[:, :2].mean(dim=(2, 3)), dim=-1)

    def text_features(self, prompts):
        return F.normalize(torch.tensor([[float(n) for n in prompt.split()] for prompt in prompts]), dim=-1)


def colour(red, green):
    return torch.tensor([red, green, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)


def clip_metrics(image, source=None, truth=None, **about):
    others = {"input": source, "truth": truth} if truth is not None else {"input": image if source is None else source}
    return {name: float(value) for name, value in m.clip_metrics(Compass(), image, others, **about).items()}


def test_clip_metrics_in_closed_form():
    half = math.sqrt(0.5)
    assert clip_metrics(colour(1, 1), colour(0, 1), prompt="1 0") == pytest.approx(
        {"clip_score": half, "input_clip_score": 0, "clip_similarity_to_input": half}
    )
    # the picture turns as the text does, the other way, and not at all
    for end, margin, turn in ((colour(0, 1), 1, 1), (colour(-1, 0), 1, half), (colour(0, -1), -1, 0)):
        found = clip_metrics(end, colour(1, 0), prompt="0 1", source_prompt="1 0")
        assert (found["clip_margin"], found["clip_directional"]) == pytest.approx((margin, turn), abs=1e-6)
    assert math.isnan(clip_metrics(colour(1, 0), prompt="0 1", source_prompt="1 0")["clip_directional"])
    left = (torch.arange(8) < 4).expand(1, 1, 8, 8)
    edit = torch.where(left, colour(1, 0), colour(-1, 1))  # inside the mask (1, 0), and black outside: (0, -0.5)
    found = clip_metrics(edit, colour(1, 0), prompt="1 0", inside=left)
    assert found["clip_score_edited"] == pytest.approx(0, abs=1e-6)


def halves(left, right):
    """A picture 8 pixels wide, the left half of one grey level and the right half of another."""
    return torch.tensor([left] * 4 + [right] * 4).view(1, 1, 1, 8).expand(1, 3, 8, 8)


def test_change_error_in_closed_form():
    """Only the right half is to change, from 0 to 0.8; the left half does not count."""
    source, truth = halves(-0.5, 0.0), halves(-0.5, 0.8)
    for right in (0.0, 0.2, 0.8, 1.0):
        for left in (-0.5, 0.9):
            assert m.change_error(halves(left, right), source, truth) == pytest.approx(abs(0.8 - right) / 0.8, abs=1e-6)
    assert math.isnan(m.change_error(source, source, source))
    rounding = halves(-0.5 + 2 / 255, 0.8)  # by a grey level, as files round
    assert m.change_error(halves(-0.5, 0.8), source, rounding) == pytest.approx(0)


def test_success_is_an_edit_that_went_half_of_the_way():
    source, truth = colour(1, 0), colour(0, 1)
    for edit, done in ((truth, True), (colour(0.4, 0.6), True), (colour(0.7, 0.75), False), (source, False)):
        found = clip_metrics(edit, source, truth, source_prompt="1 0", prompt="0 1")
        assert found["success"] == done and found["success_closer"] >= done  # which is the weaker rule
    assert not found["success_closer"]  # of the source itself
    wrong = clip_metrics(truth, source, truth, source_prompt="0 1", prompt="1 0")
    assert wrong["success"] == wrong["attainable"] == 0 < found["attainable"]  # CLIP prefers the source prompt
    assert math.isnan(clip_metrics(edit, source, source, source_prompt="1 0", prompt="0 1")["success"])  # no change


def measured(model, image=None, **about):
    source = noise(1, 32 if image is None else image.shape[-1])
    return m.Metrics().measure(model, noise() if image is None else image, EditTask(source, "a red heart", **about))


def test_every_metric_is_there_for_which_the_task_has_the_means(tiny_model):
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    full = dict(source_prompt="a heart", mask=mask, truth=noise(2))
    every = measured(tiny_model, **full)
    assert len(every) == 24 and all(math.isfinite(value) for value in every.values())
    kept = {name for name in every if name.endswith("_kept")}
    truth = {name for name in every if "truth" in name} | {"change_error", "success", "success_closer", "attainable"}
    source = {"clip_margin", "clip_directional", "success", "success_closer", "attainable"}
    for lacking, gone in (("mask", kept | {"clip_score_edited"}), ("truth", truth), ("source_prompt", source)):
        found = measured(tiny_model, **full | {lacking: None if lacking != "source_prompt" else ""})
        assert found.keys() == every.keys() - gone
    empty = measured(tiny_model, **full | {"mask": torch.zeros(1, 1, 32, 32)})
    assert empty.keys() == every.keys() - {"clip_score_edited"}
    assert empty["psnr_to_input_kept"] == pytest.approx(empty["psnr_to_input"])
    assert measured(tiny_model, **full | {"mask": mask + 1}).keys() == every.keys() - kept
    assert "clip_directional" not in m.Metrics().measure(tiny_model, noise(), EditTask(noise(), "a", "b"))  # 0/0


# Metrics with weights of their own.


def test_a_failed_download_is_one_warning(tiny_model, monkeypatch):
    def no_network(device):
        raise OSError("no route\nto host")

    monkeypatch.setattr(m, "LOADERS", {"structure_distance": no_network, "lpips": no_network})
    metrics = m.Metrics(fetch=True)
    with pytest.warns(UserWarning, match="no route.*to host") as told:
        numbers = [metrics.measure(tiny_model, noise(), EditTask(noise(1), "a heart")) for _ in range(2)][1]
    assert len(told) == 2 and {"psnr_to_input", "clip_score"} < numbers.keys()


def test_structure_distance_compares_the_keys_of_the_last_layer(monkeypatch):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    monkeypatch.setattr(timm, "create_model", lambda name, **options: vit)
    distance = m.structure_distance(torch.device("cpu"))
    a, b = noise(0, 32), noise(1, 32)

    def expected(image):
        """S_ij = cos(k_i, k_j), head by head, from the layers one after another, of pixels from 0 to 255."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        x = (F.interpolate((image / 2 + 0.5) * 255, (224, 224), mode="bilinear") - mean) / std
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


def test_the_public_clip_gives_the_features_that_open_clip_does(monkeypatch):
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"width": 32, "heads": 2, "layers": 1}
    towers = open_clip.CustomTextCLIP(16, vision, text, quick_gelu=True).eval()
    monkeypatch.setattr(open_clip, "create_model", lambda name, **options: towers)
    clip, image, prompts = m.public_clip(torch.device("cpu")), noise(0, 32), ["a photo of a cat", "two dogs"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        expected = towers.encode_image((image / 2 + 0.5 - mean) / std, normalize=True)
        assert torch.allclose(clip.image_features(image), expected, atol=1e-5)
        expected = towers.encode_text(open_clip.tokenize(prompts), normalize=True)
        assert torch.allclose(clip.text_features(prompts), expected, atol=1e-5)
