"""The losses of the three parts and the judges of samples: each is its formula, and each loss can be learned."""

import copy

import pytest
import torch

import models
from models.text import BEGIN, UNKNOWN, compact, compact_vocabulary
from samplers import FlowSchedule
from tests.conftest import TINY
from training.evaluate import pixel_scores, reconstruct, top1
from training.losses import AutoencoderObjective, ClipObjective, UNetObjective

COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


class Squares:
    """Plain pictures in four colours, whose captions name them."""

    def __getitem__(self, i):
        name = list(COLOURS)[i % 4]
        image = torch.tensor(COLOURS[name], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32).clone()
        return {"image": image, "caption": f"a {name} square"}


DATA = {"trained": Squares(), "heldout": Squares()}


def unet_objective(model, out, prompt_dropout=0.1, min_snr_gamma=5.0, probes=4):
    prompts = ["a red square"] * 8
    return UNetObjective(model, out, DATA, probes, prompt_dropout, min_snr_gamma, guidance_scale=3.0, prompts=prompts)


@pytest.fixture
def model():
    vocabulary = compact_vocabulary([Squares()[i]["caption"] for i in range(4)])
    return models.build(copy.deepcopy(TINY), seed=0, vocabulary=vocabulary)


def batch_of(objective, n=8):
    items = [Squares()[i] for i in range(n)]
    return objective.collate(items) | objective.draw(n, torch.Generator().manual_seed(0))


def learn(objective, steps=40, lr=3e-3):
    optimizer = torch.optim.Adam(objective.trained.parameters(), lr=lr)
    losses, batch = [], batch_of(objective)
    for _ in range(steps):
        loss, _ = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    frozen = {p for p in objective.parameters()} - {p for p in objective.trained.parameters()}
    assert frozen and all(p.grad is None for p in frozen)
    return losses


def test_autoencoder_loss_and_scale(model, tmp_path):
    objective = AutoencoderObjective(model, tmp_path, DATA, kl_weight=0.5, probes=8)
    batch = batch_of(objective)
    loss, _ = objective(batch)
    x = batch["image"].float() / 127.5 - 1
    mean, logvar = model.autoencoder.posterior(x)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    error = model.autoencoder.decode(mean + posterior.stddev * batch["noise"]) - x
    torch.testing.assert_close(loss, error.abs().mean() + 2 * (error**2).mean() + 0.5 * kl)
    losses = learn(objective)
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        objective.export(model.autoencoder)
    scale = models.checkpoints.read_config(tmp_path)["vae"]["scale_factor"]
    z = model.autoencoder.encode(objective.heldout)
    assert (z * scale).std().item() == pytest.approx(1, abs=0.01)
    model.config["vae"]["scale_factor"] = 1.0  # as in the process that trains another part
    unet_objective(model, tmp_path).export(model.unet)
    assert models.checkpoints.read_config(tmp_path)["vae"]["scale_factor"] == scale


def test_clip_loss_learns_and_drops_tokens(model, tmp_path):
    objective = ClipObjective(model, tmp_path, DATA, unknown_rate=0.5, probes=8)
    vocabulary, seen = model.text.vocabulary, []
    hook = model.text.tower.token_embedding.register_forward_pre_hook(lambda module, rows: seen.append(rows[0]))
    batch = batch_of(objective)
    objective(batch)
    rows, original = seen[0], compact(batch["ids"], vocabulary)
    special = (batch["ids"] == 0) | (batch["ids"] >= BEGIN)
    assert torch.equal(rows, torch.where(batch["keep"] | special, original, UNKNOWN))
    assert (rows == UNKNOWN).sum() > 8 and not (original == UNKNOWN).any()
    hook.remove()
    objective.unknown_rate = 0.0
    losses = learn(objective)
    assert losses[-1] < 0.6 * losses[0]
    assert objective.validate(model.clip)[0]["top1_of_100_heldout"] >= 0.75


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_unet_loss_is_the_weighted_denoising_error(model, tmp_path, prediction, gamma):
    model.prediction, weight = prediction, 1.0
    if prediction == "flow":
        model.schedule = FlowSchedule(shift=2.0)
    objective, seen = unet_objective(model, tmp_path, min_snr_gamma=gamma, prompt_dropout=0.0), []
    batch = batch_of(objective)
    x0, noise, t = model.encode_image(batch["image"].float() / 127.5 - 1), batch["noise"], batch["t"]
    # The untrained network outputs zero, so its error is the target itself.
    target = noise - x0
    if prediction != "flow":
        a = model.schedule.alpha_bars[t].float().view(-1, 1, 1, 1)
        target = a.sqrt() * noise - (1 - a).sqrt() * x0 if prediction == "v" else noise
        snr = (a / (1 - a)).flatten()
        weight = snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1) if gamma else 1.0
    expected = (weight * target.square().mean(dim=(1, 2, 3))).mean()
    model.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    torch.testing.assert_close(objective(batch)[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0][0], model.schedule.add_noise(x0, noise, t))
    assert t.float().std() > 100 and 0 <= t.min() < t.max() < 1000 and torch.equal(seen[0][1], t)


def test_unet_drops_prompts_and_learns(model, tmp_path, monkeypatch):
    objective = unet_objective(model, tmp_path, prompt_dropout=0.5)
    batch, seen, encode = batch_of(objective, 64), [], model.text.encode_tokens
    with monkeypatch.context() as patch:
        patch.setattr(model.text, "encode_tokens", lambda ids: seen.append(ids) or encode(ids))
        objective(batch)
    empty = (seen[0] == objective.empty).all(dim=1)
    assert torch.equal(empty, ~batch["keep"]) and 16 < empty.sum() < 48
    losses = learn(objective)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_unet_is_judged_by_the_network_that_is_given(model, tmp_path):
    objective = unet_objective(model, tmp_path, probes=40)
    average = copy.deepcopy(model.unet)
    before = objective.validate(average)
    with torch.no_grad():
        model.unet.out[-1].bias += 1.0  # the trained one moves on; the average stays
    torch.testing.assert_close(objective.validate(average), before, atol=0, rtol=0)
    assert before[1]["samples"].shape == (3, 32, 256)
    numbers, grids = objective.validate(model.unet)
    assert numbers != before[0] and not torch.equal(grids["samples"], before[1]["samples"])


def test_top1_chooses_within_blocks_and_takes_duplicates_for_right():
    names, swapped = [f"caption {i}" for i in range(8)], torch.eye(8)[[1, 0, 2, 3, 4, 5, 6, 7]]
    assert top1(torch.eye(8), names) == top1(swapped, names, choices=1) == 1
    assert top1(swapped, names) == 0.75 and top1(swapped, ["same", "same", *names[2:]]) == 1
    drawings = torch.rand(8, 3, 32, 32) * 2 - 1  # pixels judge by the nearest one
    assert top1(pixel_scores(drawings + 0.1 * torch.randn(drawings.shape), drawings), names) == 1
    assert top1(pixel_scores(drawings.roll(1, dims=0), drawings), names) == 0


def test_the_mean_psnr():
    images = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 3, 4, 4) / 40
    autoencoder = torch.nn.Linear(1, 1)  # by whose device it is known
    autoencoder.encode, autoencoder.decode = torch.clone, lambda x: x + torch.where(x < 0.5, 0.2, 0.02)
    assert reconstruct(autoencoder, images)[0] == pytest.approx((20 + 40) / 2, abs=1e-3)
