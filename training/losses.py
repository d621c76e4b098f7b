"""The losses of the three parts of a model, their random numbers, and how progress is judged."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from errors import InputError
from models.latent_diffusion import LatentDiffusion
from models.text import BEGIN, END, UNKNOWN
from training.evaluate import clip_scores, grid, pictures, reconstruct, sample, top1
from training.loop import Objective

Datasets = Mapping[str, Dataset]  # "trained" and "heldout"
UNSEEN = 10**8  # the index of the first training picture that no training reaches


class AutoencoderObjective(Objective):
    """L1 + 2 L2 of a reconstruction, and a light KL to the unit Gaussian (Kingma & Welling, 2014), as means."""

    def __init__(self, model: LatentDiffusion, out: Path, data: Datasets, kl_weight: float, probes: int):
        super().__init__(model, "autoencoder", out)
        self.kl_weight = kl_weight
        self.trained.scale_factor = 1.0  # plays no part in training, and is measured at each export
        self.heldout = pictures(data["heldout"], range(probes))[0]

    def draw(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        shape = batch_size, *self.model.latent_shape
        return {"noise": torch.randn(shape, generator=generator, device=generator.device)}

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["image"].float() / 127.5 - 1
        mean, logvar = self.trained.posterior(x)
        z = mean + (0.5 * logvar).exp() * batch["noise"]
        error = self.trained.decode(z).float() - x
        mean, logvar = mean.float(), logvar.float()
        reconstruction = error.abs().mean() + 2 * error.square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction + self.kl_weight * kl, {"reconstruction": reconstruction, "kl": kl}

    def validate(self, trained: nn.Module) -> tuple[dict[str, float], dict[str, Tensor]]:
        psnr, pairs = reconstruct(trained, self.heldout)
        return {"heldout_psnr": psnr}, {"reconstructions": pairs}

    def export(self, trained: nn.Module) -> None:
        """The weights, with the scale that gives latents unit variance in the config."""
        device = next(trained.parameters()).device
        latents = torch.cat([trained.encode(x.to(device)) for x in self.heldout.split(32)])
        self.model.config["vae"]["scale_factor"] = round(1 / latents.std().item(), 5)
        super().export(trained)


class ClipObjective(Objective):
    """The contrastive loss of CLIP (Radford et al., 2021), by open_clip. A few tokens are replaced by the unknown
    one, so that its embedding learns to mean nothing; a full vocabulary has none, and keeps all."""

    def __init__(self, model: LatentDiffusion, out: Path, data: Datasets, unknown_rate: float, probes: int):
        from open_clip.loss import ClipLoss

        super().__init__(model, "clip", out)
        self.unknown_rate = 0.0 if model.text.vocabulary is None else unknown_rate
        self.probes = {name: pictures(of, range(UNSEEN, UNSEEN + probes)) for name, of in data.items()}
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.contrastive = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)

    def collate(self, items: Sequence[dict]) -> dict[str, Tensor]:
        return Objective.collate(self, items) | {"ids": self.model.text.tokenize([i["caption"] for i in items])}

    def draw(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        shape = batch_size, self.model.text.context_length
        return {"keep": torch.rand(shape, generator=generator, device=generator.device) >= self.unknown_rate}

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        ids = batch["ids"]
        special = (ids == 0) | (ids == BEGIN) | (ids == END)
        ids = ids.masked_fill(~(batch["keep"] | special), UNKNOWN)
        images = self.trained.image_features(batch["image"].float() / 127.5 - 1)
        texts = self.trained.token_features(ids)
        scale = self.trained.logit_scale.clamp(max=4.6052).exp()  # at most 100, as in the paper
        return self.contrastive(images, texts, scale), {"logit_scale": scale}

    def validate(self, trained: nn.Module) -> tuple[dict[str, float], dict[str, Tensor]]:
        shares = {name: top1(clip_scores(trained, *probe), probe[1]) for name, probe in self.probes.items()}
        return {f"top1_of_100_{name}": share for name, share in shares.items()}, {}


class UNetObjective(Objective):
    """Denoising (Ho et al., 2020) of the latents, in the model's own prediction type, with a share of empty prompts for
    guidance (Ho & Salimans, 2021) and min-SNR weights (Hang et al., 2023; gamma 0: none): min(SNR, gamma) / SNR for
    epsilon, min(SNR, gamma) / (SNR + 1) for v. A flow's loss is unweighted, at logit-normal times."""

    collate = ClipObjective.collate

    def __init__(
        self, model: LatentDiffusion, out: Path, data: Datasets, probes: int, prompt_dropout: float,
        min_snr_gamma: float, guidance_scale: float, prompts: Sequence[str] | None = None,
    ):  # fmt: skip
        super().__init__(model, "unet", out)
        self.prompt_dropout, self.guidance_scale = prompt_dropout, guidance_scale
        if prompts and not (isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)):
            raise InputError(f"objective.prompts is {prompts}: it must be a list of texts")
        self.prompts = prompts or pictures(data["trained"], range(UNSEEN, UNSEEN + 16))[1]
        weight = torch.ones(model.schedule.timesteps)
        if min_snr_gamma and model.prediction != "flow":
            snr = model.schedule.alpha_bars / (1 - model.schedule.alpha_bars)
            weight = snr.clamp(max=min_snr_gamma) / (snr if model.prediction == "epsilon" else snr + 1)
        # Buffers go to the device with the networks, so that no step waits for a copy.
        self.register_buffer("weight", weight.float())
        self.register_buffer("empty", model.text.tokenize([""]))
        self.probe = self.collate([data["heldout"][i] for i in range(probes)])
        self.probe |= self.draw(probes, torch.Generator().manual_seed(0)) | {"keep": torch.ones(probes).bool()}

    def draw(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        where = {"generator": generator, "device": generator.device}
        noise = torch.randn(batch_size, *self.model.latent_shape, **where)
        t = self.model.schedule.draw(batch_size, generator)
        return {"noise": noise, "t": t, "keep": torch.rand(batch_size, **where) >= self.prompt_dropout}

    def forward(self, batch: dict[str, Tensor], unet: nn.Module | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of `unet`, or else of the trained one, and the plain loss."""
        with torch.no_grad():
            x0 = self.model.autoencoder.encode(batch["image"].float() / 127.5 - 1).float()
            context = self.model.text.encode_tokens(torch.where(batch["keep"][:, None], batch["ids"], self.empty))
        t, noise, schedule = batch["t"], batch["noise"], self.model.schedule
        alpha, sigma = schedule.mixture(t, x0)
        x_t = alpha * x0 + sigma * noise  # in float32, whatever autocast does to the networks
        target = alpha * noise - sigma * x0 if self.model.prediction == "v" else schedule.target(x0, noise)
        error = ((unet or self.trained)(x_t, t, context).float() - target).square().mean(dim=(1, 2, 3))
        return (error * self.weight[t.long()]).mean(), {"mse": error.mean()}

    def validate(self, trained: nn.Module) -> tuple[dict[str, float], dict[str, Tensor]]:
        batches = zip(*(v.to(self.weight.device).split(32) for v in self.probe.values()), strict=True)
        losses = [self(dict(zip(self.probe, batch, strict=True)), trained)[0] for batch in batches]
        try:
            self.model.unet = trained
            images = sample(self.model, self.prompts, self.guidance_scale, seed=0)
        finally:
            self.model.unet = self.trained
        return {"heldout_loss": torch.stack(losses).mean().item()}, {"samples": grid(images)}


OBJECTIVES = {"autoencoder": AutoencoderObjective, "clip": ClipObjective, "unet": UNetObjective}
