"""Masks that hold an edit, whatever the method: soft files, the walk, and the pixels outside."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data.tasks import EditTask, OneImage
from methods.base import Run, feathered
from samplers import ddim, guided
from tests.conftest import close
from tests.test_baselines import DDIM, DDPM, METHODS


@pytest.fixture
def masked():
    """An edit of 32 x 48 pixels: the right third is hard outside, its left neighbours have soft edges."""
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(4)) * 2 - 1
    region = torch.ones(1, 1, 32, 48)
    region[..., 24:32], region[..., 32:] = 0.5, 0
    return EditTask(image, "a red heart", "a cat", region=region)


@pytest.mark.parametrize("name", METHODS)
def test_outside_the_mask_every_method_leaves_the_pixels_as_they_were(tiny_model, masked, edit, name):
    schedule, z = tiny_model.schedule, tiny_model.encode_image(masked.image).double()
    edits, _, _ = edit(METHODS[name], tiny_model, masked)
    free, _, _ = edit(METHODS[name], tiny_model, replace(masked, region=None))
    assert tiny_model.schedule is schedule
    for (_, latent, picture), (_, _, other) in zip(edits, free, strict=True):
        assert torch.equal(picture[..., 32:], masked.image[0, ..., 32:]) and torch.equal(latent[..., 8:], z[..., 8:])
        assert (picture[..., :24] - masked.image[0, ..., :24]).abs().max() > 0.05
        assert (other[..., 32:] - masked.image[0, ..., 32:]).abs().max() > 0.05
    edits, _, _ = edit(METHODS[name], tiny_model, replace(masked, feather=None))
    close(edits[0][2], tiny_model.decode_latents(edits[0][1])[0].float().clamp(-1, 1), 1e-6)


@pytest.mark.parametrize("sampler", [DDIM, DDPM, replace(DDIM, eta=0.7, spacing="trailing")])
def test_each_step_outside_lies_on_the_path_to_the_input(tiny_model, sampler):
    """alpha z + sigma n with the noise n of the start, from any start; a soft mask mixes the two."""
    z, start = torch.randn(2, 1, 4, 8, 12, generator=torch.Generator().manual_seed(0)).double()
    inside = torch.zeros(1, 1, 8, 12).double()
    inside[..., :4], inside[..., 4:6] = 1, 0.25
    free, seen, denoise = sampler.trajectory(tiny_model.schedule), [], guided(tiny_model, "a cat", 2.0)
    confined = sampler.trajectory(tiny_model.schedule.confined(z, inside))
    sampler.sample(denoise, start, confined, Run().noise(), callback=lambda i, x: seen.append(x))
    n = (start - free.levels[0].sqrt() * z) / (1 - free.levels[0]).sqrt()
    for x, a in zip(seen, free.levels[1:], strict=True):
        close(x[..., 6:], (a.sqrt() * z + (1 - a).sqrt() * n)[..., 6:], 1e-9)
    first = []
    sampler.sample(denoise, start, free, Run().noise(), callback=lambda i, x: first.append(x))
    a, seen, first = free.levels[1], seen[0], first[0]
    assert torch.equal(seen[..., :4], first[..., :4])
    close(seen[..., 4:6], (0.25 * first + 0.75 * (a.sqrt() * z + (1 - a).sqrt() * n))[..., 4:6], 1e-9)
    up = [ddim.invert(denoise, z, grid).latent for grid in (free, confined)]
    assert torch.equal(*up)


def test_the_edge_is_feathered_inwards():
    region = torch.zeros(1, 1, 9, 12)
    region[..., :8] = 1
    assert torch.equal(feathered(region, 0), region)
    row = torch.tensor([1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0])
    close(feathered(region, 3), row.expand(1, 1, 9, 12), 1e-6)  # the picture's border is no edge


def test_a_masks_file_may_be_soft_and_of_another_size(tmp_path):
    ramp = np.zeros((40, 60), np.uint8)
    ramp[:, :20], ramp[:, 20:40] = 200, np.linspace(200, 1, 20)
    Image.fromarray(ramp).save(tmp_path / "mask.png")
    Image.effect_noise((96, 64), 60).save(tmp_path / "x.png")
    source = OneImage(str(tmp_path / "x.png"), "a cat", fit="keep", mask=str(tmp_path / "mask.png"))
    task = source.load(*source.share, 32, 8)
    assert task.image.shape[2:] == task.region.shape[2:] == task.mask.shape[2:] == (24, 40)
    assert (task.region[..., :13] == 1).all() and not task.region[..., 28:].any()
    assert ((task.region > 0.1) & (task.region < 0.9)).any()
    assert task.mask[..., :26].all() and not task.mask[..., 27:].any()
