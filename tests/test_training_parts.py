"""The losses of the three parts: each is what its formula says, and each can be learned."""

import copy

import pytest
import torch

import models
from models.text import END, UNKNOWN
from training.parts import AutoencoderObjective, ClipObjective, UNetObjective, grid, mean_psnr, top1_of

COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


class Squares:
    """Plain pictures in four colours, whose captions name them."""

    def __getitem__(self, i):
        name = list(COLOURS)[i % 4]
        image = torch.tensor(COLOURS[name], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32).clone()
        return {"image": image, "caption": f"a {name} square", "concept": name}


@pytest.fixture
def model(tiny_config):
    return models.build(copy.deepcopy(tiny_config), seed=0)


def batch_of(objective, n=8):
    items = [Squares()[i] for i in range(n)]
    return objective.collate(items) | objective.draw(n, torch.Generator().manual_seed(0))


def learn(objective, steps=30, lr=3e-3):
    optimizer = torch.optim.Adam([p for p in objective.trained.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss, _ = objective(batch_of(objective))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_autoencoder_loss_and_scale(model, tmp_path):
    objective = AutoencoderObjective(model, tmp_path, Squares(), kl_weight=0.5, probes=8)
    batch = batch_of(objective)
    loss, _ = objective(batch)
    x = batch["image"].float() / 127.5 - 1
    mean, logvar = model.autoencoder.posterior(x)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    error = model.autoencoder.decode(mean + posterior.stddev * batch["noise"]) - x
    expected = error.abs().mean() + 2 * (error**2).mean() + 0.5 * kl
    torch.testing.assert_close(loss, expected)
    losses = learn(objective)
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        objective.export(model.autoencoder)
    scaled = models.checkpoints.read_config(tmp_path)["vae"]["scale_factor"]
    model.config["vae"]["scale_factor"] = 1.0  # as the process that trains another part has read it
    UNetObjective(model, tmp_path, Squares(), ["a"], 0.0, 5.0, 3.0, probes=4).export(model.unet)
    assert models.checkpoints.read_config(tmp_path)["vae"]["scale_factor"] == scaled  # another part leaves it alone
    z = model.autoencoder.encode(objective.heldout)
    assert (z * scaled).std().item() == pytest.approx(1, abs=0.01)


def test_a_measured_scale_does_not_change_training(tiny_config, tmp_path):
    """A resumed run finds the scale of its last export in the config; the loss must be that of the first run."""
    losses = []
    for scale in (1.0, 0.37):
        config = copy.deepcopy(tiny_config)
        config["vae"]["scale_factor"] = scale
        objective = AutoencoderObjective(models.build(config, seed=0), tmp_path, Squares(), 0.5, probes=4)
        losses.append(objective(batch_of(objective))[0])
    assert torch.equal(*losses)


def test_grid_fills_its_last_row():
    images = torch.full((5, 3, 2, 2), -1.0)
    picture = grid(images, 4)
    assert picture.shape == (3, 4, 8)
    assert (picture[:, 2:, 2:] == 1).all() and (picture[:, :2] == -1).all() and (picture[:, 2:, :2] == -1).all()


def test_clip_loss_learns_and_replaces_tokens(model, tmp_path):
    objective = ClipObjective(model, tmp_path, {"all": Squares()}, unknown_rate=0.5, probes=8)
    seen = []
    inner = model.text.encode_tokens
    model.text.encode_tokens = lambda ids: (seen.append(ids), inner(ids))[1]
    objective(batch_of(objective))
    ids, original = seen[0], batch_of(objective)["ids"]
    assert ((ids == original) | (ids == UNKNOWN)).all() and (ids == UNKNOWN).any()
    assert (ids[original == 0] == 0).all() and (ids == END).sum() == len(ids)  # padding and ends stay
    del model.text.encode_tokens
    objective.unknown_rate = 0.0
    losses = learn(objective, steps=40)
    assert losses[-1] < 0.6 * losses[0]
    assert objective.validate(model.clip)[0]["top1_of_100_all"] >= 0.75


def test_top1_counts_its_own_caption(model):
    class Oracle:
        logit_scale = torch.zeros(1)

        def __init__(self, order):
            self.order = order

        def image_features(self, x):
            return torch.eye(8)[self.order[: len(x)]]

        def text_features(self, captions):
            return torch.eye(8)[: len(captions)]

    names = [f"caption {i}" for i in range(8)]
    images = torch.zeros(8, 3, 4, 4)
    assert top1_of(Oracle(list(range(8))), images, names) == 1
    assert top1_of(Oracle([1, 0, 2, 3, 4, 5, 6, 7]), images, names) == 0.75
    assert top1_of(Oracle([1, 0, 2, 3, 4, 5, 6, 7]), images, ["same", "same", *names[2:]]) == 1


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_unet_loss_is_the_weighted_denoising_error(model, tmp_path, prediction, gamma):
    model.prediction = prediction
    objective = UNetObjective(model, tmp_path, Squares(), ["a"], 0.0, gamma, 3.0, probes=4)
    batch = batch_of(objective)
    loss, _ = objective(batch)
    x0 = model.encode_image(batch["image"].float() / 127.5 - 1)
    a = model.schedule.alpha_bars[batch["t"]].float().view(-1, 1, 1, 1)
    # The untrained network outputs zero, so its error is the target itself.
    target = batch["noise"] if prediction == "epsilon" else a.sqrt() * batch["noise"] - (1 - a).sqrt() * x0
    snr = (a / (1 - a)).flatten()
    weight = snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1) if gamma else torch.ones(len(snr))
    torch.testing.assert_close(loss, (weight * target.square().mean(dim=(1, 2, 3))).mean(), rtol=1e-4, atol=1e-5)


def test_unet_drops_prompts_and_learns(model, tmp_path):
    objective = UNetObjective(model, tmp_path, Squares(), ["a red square"] * 8, 0.5, 5.0, 3.0, probes=4)
    seen = []
    inner = model.text.encode_tokens
    model.text.encode_tokens = lambda ids: (seen.append(ids), inner(ids))[1]
    batch = batch_of(objective, 64)
    objective(batch)
    empty = (seen[0] == objective.empty).all(dim=1)
    assert torch.equal(empty, ~batch["keep"]) and 16 < empty.sum() < 48
    del model.text.encode_tokens
    assert not any(p.requires_grad for p in model.autoencoder.parameters())
    losses = learn(objective, steps=40)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    numbers, grids = objective.validate(objective.trained)
    assert 0 < numbers["heldout_loss"] < 2 and grids["samples"].shape == (3, 32, 256)
    assert objective.trained is model.unet


def test_mean_psnr():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    assert mean_psnr(a, b) == pytest.approx((20 + 40) / 2, abs=1e-3)
