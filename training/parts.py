"""What is learned in each part of the model: the losses, their random numbers, and how progress is judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from einops import rearrange
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.utils.data import Dataset

from evaluation.metrics import psnr
from models.checkpoints import export_part
from models.latent_diffusion import LatentDiffusion
from models.text import BEGIN, END, UNKNOWN, Clip
from samplers import Sampler, guided, noise_like
from training.loop import Objective


def pictures(dataset: Dataset, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
    """Pictures (B, 3, H, W) in [-1, 1] and their captions."""
    items = [dataset[i] for i in indices]
    return torch.stack([i["image"] for i in items]).float() / 127.5 - 1, [i["caption"] for i in items]


def mean_psnr(a: Tensor, b: Tensor) -> float:
    """PSNR of each picture against its twin in dB, averaged over the batch."""
    return sum(psnr(x, y) for x, y in zip(a, b, strict=True)) / len(a)


def grid(images: Tensor, columns: int) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> one picture (3, H', W'), the last row filled up with white."""
    missing = -len(images) % columns
    images = torch.cat([images, images.new_ones(missing, *images.shape[1:])])
    return rearrange(images, "(r c) ch h w -> ch (r h) (c w)", c=columns)


class AutoencoderObjective(Objective):
    """L1 + 2 L2 between a picture and its reconstruction, and a light KL to the unit Gaussian (Kingma & Welling,
    2014), all as means over elements."""

    def __init__(self, model: LatentDiffusion, out: Path, heldout: Dataset, kl_weight: float, probes: int):
        super().__init__()
        self.trained = model.autoencoder
        self.trained.scale_factor = 1.0  # plays no part in training, and is measured at each export
        self.model, self.out, self.kl_weight = [model], out, kl_weight  # in a list: not a submodule
        self.heldout = pictures(heldout, range(probes))[0]
        side = self.heldout.shape[-1] // self.trained.downsampling
        self.latent_shape = (self.trained.z_channels, side, side)

    def draw(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"noise": torch.randn(batch_size, *self.latent_shape, generator=generator)}

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x = (batch["image"].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        mean, logvar = self.trained.posterior(x)
        z = mean + (0.5 * logvar).exp() * batch["noise"]
        error = self.trained.decode(z).float() - x
        mean, logvar = mean.float(), logvar.float()
        reconstruction = error.abs().mean() + 2 * error.square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction + self.kl_weight * kl, {"reconstruction": reconstruction, "kl": kl}

    def reconstruct(self, trained: nn.Module) -> Tensor:
        device = next(trained.parameters()).device
        return torch.cat([trained.decode(trained.encode(x.to(device))).cpu() for x in self.heldout.split(32)])

    def validate(self, trained: nn.Module) -> tuple[dict[str, float], dict[str, Tensor]]:
        y = self.reconstruct(trained)
        pairs = torch.stack([self.heldout[:32], y[:32]], dim=1).flatten(0, 1)
        return {"heldout_psnr": mean_psnr(y, self.heldout)}, {"reconstructions": grid(pairs, 8)}

    @torch.no_grad()
    def export(self, trained: nn.Module) -> None:
        """The weights, with the scale that gives latents unit variance in the config."""
        device = next(trained.parameters()).device
        z = torch.cat([trained.encode(x.to(device)) for x in self.heldout.split(32)])
        self.model[0].config["vae"]["scale_factor"] = round(1 / z.std().item(), 5)
        export_part(self.model[0], trained, self.out, "autoencoder")


class ClipObjective(Objective):
    """The contrastive loss of CLIP (Radford et al., 2021), by open_clip. A few tokens are replaced by the unknown
    one, so that its embedding learns to mean nothing."""

    def __init__(
        self, model: LatentDiffusion, out: Path, datasets: dict[str, Dataset], unknown_rate: float, probes: int
    ):
        super().__init__()
        self.trained: Clip = model.clip
        self.model, self.out, self.unknown_rate = [model], out, unknown_rate
        self.probes = {name: pictures(dataset, range(probes)) for name, dataset in datasets.items()}
        self.context_length = model.text.context_length
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.contrastive = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)

    def collate(self, items: Sequence[dict]) -> dict:
        return super().collate(items) | {"ids": self.trained.text.tokenize([i["caption"] for i in items])}

    def draw(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"keep": torch.rand(batch_size, self.context_length, generator=generator) >= self.unknown_rate}

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch["ids"]
        special = (ids == 0) | (ids == BEGIN) | (ids == END)
        ids = torch.where(batch["keep"] | special, ids, UNKNOWN)  # id 1 is '"', which no vocabulary here holds
        images = self.trained.image_features(batch["image"].float() / 127.5 - 1)
        texts = self.trained.token_features(ids)
        scale = self.trained.logit_scale.clamp(max=4.6052).exp()  # at most 100, as in the paper
        loss = self.contrastive(images, texts, scale)
        return loss, {"logit_scale": scale}

    def validate(self, trained: nn.Module) -> tuple[dict[str, float], dict[str, Tensor]]:
        return {f"top1_of_100_{name}": top1_of(trained, *probe) for name, probe in self.probes.items()}, {}

    def export(self, trained: nn.Module) -> None:
        export_part(self.model[0], trained, self.out, "clip")


def top1_of(clip: Clip, images: Tensor, captions: Sequence[str], choices: int = 100) -> float:
    """Share of pictures whose own caption CLIP ranks first among `choices` (its own block of the list). Captions
    that occur twice in a block count as right, for they are."""
    device = clip.logit_scale.device
    image_features = torch.cat([clip.image_features(x.to(device)) for x in images.split(100)])
    text_features = torch.cat([clip.text_features(captions[i : i + 100]) for i in range(0, len(captions), 100)])
    right = 0
    for start in range(0, len(captions), choices):
        block = slice(start, start + choices)
        best = (image_features[block] @ text_features[block].T).argmax(dim=1).tolist()
        names = captions[block]
        right += sum(names[b] == name for b, name in zip(best, names, strict=True))
    return right / len(captions)


class UNetObjective(Objective):
    """Denoising (Ho et al., 2020) of the latents, in the model's own prediction type, with min-SNR weights (Hang et
    al., 2023, with gamma; 0: none) and a share of empty prompts for guidance (Ho & Salimans, 2021)."""

    def __init__(
        self,
        model: LatentDiffusion,
        out: Path,
        heldout: Dataset,
        prompts: Sequence[str],
        prompt_dropout: float,
        min_snr_gamma: float,
        guidance_scale: float,
        probes: int,
    ):
        super().__init__()
        self.trained = model.unet
        self.model, self.out = [model], out
        self.prompt_dropout, self.min_snr_gamma = prompt_dropout, min_snr_gamma
        self.prompts, self.guidance_scale = prompts, guidance_scale
        self.autoencoder = model.autoencoder.requires_grad_(False)
        self.text = model.text.requires_grad_(False)
        self.empty = self.text.tokenize([""])
        images, captions = pictures(heldout, range(probes))
        generator = torch.Generator().manual_seed(0)
        self.probe = self.draw(len(images), generator) | {"ids": self.text.tokenize(captions)}
        self.probe |= {"image": ((images + 1) * 127.5).round(), "keep": torch.ones(len(images), dtype=torch.bool)}

    def collate(self, items: Sequence[dict]) -> dict:
        return super().collate(items) | {"ids": self.text.tokenize([i["caption"] for i in items])}

    def draw(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        schedule = self.model[0].schedule
        return {
            "noise": torch.randn(batch_size, *self.model[0].latent_shape, generator=generator),
            "t": torch.randint(len(schedule.alpha_bars), (batch_size,), generator=generator),
            "keep": torch.rand(batch_size, generator=generator) >= self.prompt_dropout,
        }

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.model[0]
        with torch.no_grad():
            x = (batch["image"].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            x0 = self.autoencoder.encode(x).float()  # the noising must not be rounded, whatever autocast does
            ids = torch.where(batch["keep"][:, None], batch["ids"], self.empty.to(batch["ids"].device))
            context = self.text.encode_tokens(ids)
        t, noise = batch["t"], batch["noise"].to(x0)
        x_t = model.schedule.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
        target = noise if model.prediction == "epsilon" else model.schedule.v(x0, noise, t)
        error = (self.trained(x_t, t, context).float() - target.float()).square().mean(dim=(1, 2, 3))
        return (error * self.weight(t).to(error)).mean(), {"mse": error.mean()}

    def weight(self, t: Tensor) -> Tensor:
        """min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v."""
        if not self.min_snr_gamma:
            return torch.ones(t.shape)
        schedule = self.model[0].schedule
        snr = schedule.snr(t)
        return snr.clamp(max=self.min_snr_gamma) / (snr if self.model[0].prediction == "epsilon" else snr + 1)

    def validate(self, trained: nn.Module) -> tuple[dict[str, float], dict[str, Tensor]]:
        model, device = self.model[0], next(trained.parameters()).device
        current, model.unet, self.trained = self.trained, trained, trained
        try:
            losses = []
            for i in range(0, len(self.probe["t"]), 32):
                loss, _ = self({k: v[i : i + 32].to(device) for k, v in self.probe.items()})
                losses.append(loss)
            images = sample(model, self.prompts, self.guidance_scale, seed=0)
        finally:
            model.unet = self.trained = current
        return {"heldout_loss": torch.stack(losses).mean().item()}, {"samples": grid(images, 8)}

    def export(self, trained: nn.Module) -> None:
        export_part(self.model[0], trained, self.out, "unet")


@torch.no_grad()
def sample(model: LatentDiffusion, prompts: Sequence[str], guidance_scale: float, seed: int, steps: int = 30) -> Tensor:
    """One picture (B, 3, H, W) in [-1, 1] per prompt, from noise, by DDIM with guidance."""
    sampler = Sampler(steps=steps)
    generator = torch.Generator().manual_seed(seed)
    like = torch.empty(len(prompts), *model.latent_shape, device=model.device, dtype=model.dtype)
    noise = noise_like(like, generator)
    images = []
    for i in range(0, len(prompts), 50):
        denoise = guided(model, model.encode_text(prompts[i : i + 50]), model.encode_text([""]), guidance_scale)
        z = sampler.sample(denoise, noise[i : i + 50], sampler.trajectory(model.schedule))
        images.append(model.decode_latents(z).clamp(-1, 1).cpu())
    return torch.cat(images)
