"""Imagic: text-based real image editing with diffusion models (Kawar et al., 2022, arXiv 2210.09276), figure 3:

(A) optimise the text embedding so that the frozen network denoises the input image under it; (B) fine-tune the network
at that embedding; (C) interpolate between the optimised and the target embedding, and sample.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from methods import imagic_extras, lora
from methods.base import RECONSTRUCTION, Method, Result, Run, check, cosine
from methods.optimisation import OPTIMIZERS, restored, tune
from samplers import Conditioning, Sampler, guided, noise_like


@dataclass
class Imagic(Method):
    """The defaults fit the shipped model. The reconstruction is the edit with eta 0 from the first start."""

    sampler: Sampler
    # (A) the embedding [e_opt]
    embedding_steps: int = 60  # optimisation steps; 0 keeps the start
    embedding_lr: float = 3e-3  # learning rate
    embedding_optimizer: str = "adam"  # adam | adafactor
    embedding_init: str = "target"  # where it starts: target (the prompt's embedding [e_tgt]) | random
    embedding_noise: float = 0.0  # noise on it at each step, in standard deviations of the target embedding
    num_embeddings: int = 1  # embeddings optimised side by side; sample i uses embedding i modulo this
    clip_weight: float = 0.0  # weight of 1 - cos(CLIP of the embedding, CLIP of the image); needs a model with CLIP
    # (B) the network [theta]
    tuning_steps: int = 60  # optimisation steps; 0 keeps the network
    tuning_lr: float = 1e-5  # learning rate for tune=all and tune=attention
    tuning_optimizer: str = "adam"  # adam | adafactor (steps as long as Adam's, hardly any state)
    tuning_batch: int = 1  # draws of timestep and noise per step
    tune: str = "all"  # which weights move: all | attention (its attention layers) | lora (low-rank additions to them)
    lora_rank: int = 8  # for tune=lora
    lora_lr: float = 1e-4  # learning rate for tune=lora
    gradient_checkpointing: bool = False  # (A) and (B) in less memory and more time, with the same result
    decoder_steps: int = 0  # auxiliary network [phi]: steps of fitting the decoder to the image; 0 keeps it
    decoder_lr: float = 1e-4  # its learning rate
    # (C) the edit
    eta: float | Sequence[float] = 0.8  # [eta] 0 gives back the input, 1 is the prompt alone; a list: one edit for each
    guidance_scale: float = 2.0  # classifier-free guidance; 1 is without
    num_samples: int = 1  # edits for each eta, each from a start of its own
    style_eta: float | None = None  # style mixing: another eta for the last, low-noise part of the steps
    style_from: float = 0.5  # the fraction of the steps after which style_eta takes over

    def __post_init__(self) -> None:
        choices = {"embedding_init": ("target", "random"), "tune": ("all", "attention", "lora")}
        choices |= {"embedding_optimizer": OPTIMIZERS, "tuning_optimizer": OPTIMIZERS}
        counts = ("num_embeddings", "tuning_batch", "lora_rank", "num_samples")
        check(self, shares=("eta", "style_eta", "style_from"), counts=counts, **choices)

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        model.unet.gradient_checkpointing |= self.gradient_checkpointing
        trajectory, target = self.sampler.trajectory(model.schedule), model.encode_text([task.prompt])
        optimised = self.optimise_embedding(model, task, z, target, run)
        decoder = imagic_extras.fitted_decoder(model, z, task.image, self.decoder_steps, self.decoder_lr, run)
        with self.tuned_network(model, task, z, optimised, run) if self.tuning_steps else nullcontext(), decoder:
            yield from self.interpolate(model, task, z, target, optimised, trajectory, run)

    def optimise_embedding(self, model, task, z: Tensor, target: Conditioning, run: Run) -> Conditioning:
        """(A) e_opt = argmin_e E ||eps - eps_theta(x_t, t, e)||^2, starting at e_tgt (eq. 2): a row for each embedding.

        The losses are summed, so that each embedding moves as it would alone. A pooled vector stays the target's.
        """
        rows, noise = target[[0] * self.num_embeddings], run.noise("embedding")
        e, spread = target.states.float().repeat(len(rows), 1, 1), target.states.float().std()
        if self.embedding_init == "random":  # normal, with the target's mean and standard deviation
            e = target.states.float().mean() + spread * noise_like(e, noise)
        clip = imagic_extras.clip_term(model, task, self.clip_weight)

        def loss() -> dict[str, Tensor]:
            noisy = e + self.embedding_noise * spread * noise_like(e, noise) if self.embedding_noise else e
            c = replace(rows, states=noisy.to(model.dtype))
            return {"denoising": denoising_losses(model, z, c, noise).sum(), **clip(c.states)}

        key = self.key(task, run, "embedding", "clip")
        how = self.embedding_steps, self.embedding_lr, self.embedding_optimizer
        tune({"e_opt": e}, loss, run, "embedding", key, *how)
        optimised = replace(rows, states=e.detach().to(rows.states))
        run.metrics["embedding_cosine"] = sum(cosine(e, target.states) for e in optimised.states) / len(rows)
        run.tensors |= {"target_embedding": target.states, "optimised_embedding": optimised.states}
        return optimised

    @contextmanager
    def tuned_network(self, model, task, z: Tensor, optimised: Conditioning, run: Run) -> Iterator[None]:
        """(B) Inside, theta = argmin_theta E ||eps - eps_theta(x_t, t, e_opt)||^2; afterwards the UNet is as before."""
        names = [name for name, _ in model.unet.named_parameters()]
        names = lora.in_attention(names) if self.tune == "attention" else names
        weights, lr = restored(model.unet, names), self.tuning_lr
        if self.tune == "lora":
            weights, lr = lora.adapters(model.unet, self.lora_rank, run.noise("lora")), self.lora_lr
        noise, lean = run.noise("tuning"), self.gradient_checkpointing or self.tuning_optimizer == "adafactor"

        def loss() -> dict[str, Tensor]:
            c = optimised[torch.randint(len(optimised), (self.tuning_batch,), generator=noise)]
            return {"denoising": denoising_losses(model, z, c, noise).mean()}

        with weights as theta:
            key = self.key(task, run, "embedding", "clip", "tun", "lora")
            tune(theta, loss, run, "tuning", key, self.tuning_steps, lr, self.tuning_optimizer, lean)
            yield

    def interpolate(self, model, task, z, target: Conditioning, optimised, trajectory, run: Run) -> Iterator[Result]:
        """(C) Sample under e = eta e_tgt + (1 - eta) e_opt (eq. 3). Sample i has one start for all etas."""
        null, samples = model.encode_text([task.negative_prompt]), range(self.num_samples)
        starts = [noise_like(z, run.noise("start", i)) for i in samples]
        run.tensors["start_latents"] = torch.cat(starts)

        def sample(i: int, eta: float, late_eta: float, stage: str) -> Tensor:
            mixtures = [a * target + (1 - a) * optimised[i % len(optimised)] for a in (eta, late_eta)]
            early, late = (guided(model, e, self.guidance_scale, null) for e in mixtures)
            denoise = imagic_extras.style_mixed(early, late, trajectory, self.style_from)
            return self.sampler.sample(denoise, starts[i], trajectory, run.noise("sampling", i), run.progress(stage))

        style = {} if self.style_eta is None else {"style_eta": self.style_eta}
        for eta in self.eta if isinstance(self.eta, Sequence) else [self.eta]:
            for i in samples:
                yield {"eta": float(eta), "sample": i} | style, sample(i, eta, style.get("style_eta", eta), "editing")
        yield RECONSTRUCTION, sample(0, 0.0, 0.0, "reconstruction")

    def key(self, task, run: Run, *words: str) -> dict:
        """The prompt, the seed and the settings whose names contain one of `words`: all that a stage depends on."""
        settings = {name: value for name, value in vars(self).items() if any(word in name for word in words)}
        return {"method": "imagic", "prompt": task.prompt, "seed": run.seed, **settings}


def denoising_losses(model, z: Tensor, e: Conditioning, noise: torch.Generator) -> Tensor:
    """||eps - eps_theta(x_t, t, e)||^2, the mean over elements, at one draw of t and eps for each row of e (B, L, C):
    z (1, c, h, w) -> (B,) float32. Of a flow model it is the loss of its velocity eps - z."""
    t = model.schedule.draw(len(e), noise).to(z.device)
    eps = noise_like(z.expand(len(e), -1, -1, -1), noise)
    error = model.predict(model.schedule.add_noise(z, eps, t), t, e) - model.schedule.target(z, eps)
    return error.square().flatten(1).mean(dim=1).float()
