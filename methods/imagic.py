"""Imagic: text-based real image editing with diffusion models (Kawar et al., 2022, arXiv 2210.09276).

Three stages, as in the paper's figure 3: (A) optimise the text embedding so that the frozen network denoises
the input image under it; (B) fine-tune the network at that embedding; (C) interpolate between the optimised
and the target embedding, and sample.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from errors import InputError
from methods import lora
from methods.base import (
    OPTIMIZERS,
    Edit,
    EditResult,
    Reporter,
    cached_stage,
    check,
    check_choice,
    checkpointing,
    cosine,
    frozen,
    generator,
    minimise,
    replaced,
    to_image,
    trainable,
)
from samplers import Denoiser, Sampler, ddim, guided, noise_like

Stage = tuple[dict[str, Tensor], dict[str, Tensor]]  # what a stage found, by name, and its curves


@dataclass
class Imagic:
    """The settings. conf/method/imagic.yaml says what each one does and its symbol in the paper.
    Raises InputError for one that is out of range."""

    sampler: Sampler
    # Stage A
    embedding_steps: int = 100
    embedding_lr: float = 1e-2
    embedding_optimizer: str = "adam"  # adam | sgd | adafactor
    embedding_init: str = "target"  # target | random
    embedding_noise: float = 0.0  # in standard deviations of the target embedding
    num_embeddings: int = 1
    clip_weight: float = 0.0
    # Stage B
    tuning_steps: int = 120
    tuning_lr: float = 1e-4
    tuning_optimizer: str = "adam"  # adam | sgd | adafactor
    tuning_batch: int = 1
    tune: str = "all"  # all | attention | lora
    lora_rank: int = 8
    gradient_checkpointing: bool = False  # and, with it, one gradient at a time
    decoder_steps: int = 0  # 0: the decoder stays as it is
    decoder_lr: float = 1e-4
    # Stage C
    eta: float | Sequence[float] = 0.8
    guidance_scale: float = 2.0
    num_samples: int = 1
    start: str = "inversion"  # inversion | noise
    style_eta: float | None = None
    style_from: float = 0.5  # fraction of the steps

    def __post_init__(self) -> None:
        if isinstance(self.eta, Iterable) and not len(self.eta):
            raise InputError("method.eta is an empty list: it must hold at least one number from 0 to 1")
        check(self, "eta", high=1, many=True)
        check(self, "style_from", high=1)
        if self.style_eta is not None:
            check(self, "style_eta", high=1)
        check(self, "embedding_steps", "tuning_steps", "decoder_steps", whole=True)
        check(self, "num_embeddings", "tuning_batch", "lora_rank", "num_samples", low=1, whole=True)
        check(self, "embedding_lr", "tuning_lr", "decoder_lr")
        check(self, "embedding_noise", "clip_weight", "guidance_scale")
        check_choice(self, OPTIMIZERS, "embedding_optimizer", "tuning_optimizer")
        check_choice(self, ("target", "random"), "embedding_init")
        check_choice(self, ("all", "attention", "lora"), "tune")
        check_choice(self, ("inversion", "noise"), "start")
        noiseless = self.sampler.kind == "ddim" and self.sampler.eta == 0
        if self.start == "inversion" and noiseless and self.num_samples > self.num_embeddings:
            raise InputError(
                f"method.num_samples is {self.num_samples}, and all would be one picture: the image has one "
                "inversion, and DDIM adds no noise; set method.start=noise or sampler.eta above 0"
            )

    def edit(self, model, task, reporter: Reporter = Reporter(), seed: int = 0) -> EditResult:
        """One edit for each eta and sample. The reconstruction is the edit with eta 0 from the first start.

        Raises InputError if a loss or the result is not finite, if the sampler asks for more steps than the
        model's schedule has, or if `clip_weight` asks for a CLIP that the model does not have.
        """
        trajectory = self.sampler.trajectory(model.schedule)  # refuses too many steps now, and not after tuning
        with frozen(model), checkpointing(model.unet, self.gradient_checkpointing), torch.no_grad():
            x = model.encode_image(task.image)  # the paper's x, here a latent (1, c, h, w)
            e_tgt = model.encode_text([task.prompt])  # (1, L, C)
            embedding, curves_a = self.optimise_embedding(model, task, x, e_tgt, reporter, seed)
            e_opt = embedding["e_opt"].to(x)  # (K, L, C)
            unet, curves_b = self.tune_network(model, task, x, e_opt, reporter, seed)
            decoder, curves_d = self.tune_decoder(model, task, x, reporter)
            with replaced(model.unet, unet), replaced(model.autoencoder, decoder):
                result = self.interpolate(model, x, e_tgt, e_opt, trajectory, reporter, seed)

        result.metrics["embedding_cosine"] = sum(cosine(e, e_tgt) for e in e_opt) / len(e_opt)
        result.tensors |= {"source_latent": x, "target_embedding": e_tgt, "optimised_embedding": e_opt}
        for stage, curves in {"embedding": curves_a, "tuning": curves_b, "decoder": curves_d}.items():
            if len(loss := curves.get("loss", ())):
                result.metrics[f"{stage}_loss"] = float(loss[-max(1, len(loss) // 10) :].mean())
                result.tensors[f"{stage}_loss"] = loss
        return result

    def optimise_embedding(self, model, task, x, e_tgt, reporter, seed) -> Stage:
        """Stage A: e_opt = argmin_e E ||eps - eps_theta(x_t, t, e)||^2 from e = e_tgt (eq. 2) -> (K, L, C).

        Each of the K embeddings sees noise of its own. With `clip_weight` w the loss grows by w (1 - cos),
        the cosine being that between CLIP's features of the embedding and of the input image.
        """
        if self.clip_weight and model.clip is None:
            raise InputError(
                "method.clip_weight needs a model with a CLIP image tower, and this one has none: set it to 0"
            )
        noise = generator(seed, "embedding")
        spread = e_tgt.float().std()
        e = e_tgt.float().repeat(self.num_embeddings, 1, 1)
        if self.embedding_init == "random":  # normal, with the target's mean and standard deviation
            e = e_tgt.float().mean() + spread * noise_like(e, noise)
        if self.clip_weight:
            ids = model.text.tokenize([task.prompt] * self.num_embeddings)
            seen = model.clip.image_features(task.image.to(x))
            model.text.pool(e.to(x.dtype), ids)  # raises now, and not after hours, if there is no projection

        def terms() -> dict[str, Tensor]:
            shaken = e + self.embedding_noise * spread * noise_like(e, noise) if self.embedding_noise else e
            shaken = shaken.to(x.dtype)
            # The sum over embeddings lets each one move as it would alone (under adam and sgd).
            losses = {"denoising": denoising_losses(model, x, shaken, noise).sum()}
            if self.clip_weight:
                agreement = (model.text.pool(shaken, ids) * seen).sum(dim=-1).float()
                losses["clip"] = self.clip_weight * (1 - agreement).sum()
            return losses

        def build() -> Stage:
            e.requires_grad_()
            steps, lr, optimizer = self.embedding_steps, self.embedding_lr, self.embedding_optimizer
            curves = minimise(terms, [e], steps, lr, optimizer, "embedding", "method.embedding_lr", reporter)
            return {"e_opt": e.to(x.dtype)}, curves

        return cached_stage(reporter, "embedding", self.key(task, seed), build)

    def tune_network(self, model, task, x, e_opt, reporter, seed) -> Stage:
        """Stage B: min_theta E ||eps - eps_theta(x_t, t, e_opt)||^2 -> the UNet's tuned weights by name.

        Each noise draw of the batch takes one of the K embeddings at random.
        """
        noise = generator(seed, "tuning")

        def terms() -> dict[str, Tensor]:
            k = torch.randint(len(e_opt), (self.tuning_batch,), generator=noise)
            return {"denoising": denoising_losses(model, x, e_opt[k.to(x.device)], noise).mean()}

        def build() -> Stage:
            with self.tunable(model.unet, seed) as weights:
                steps, lr, optimizer = self.tuning_steps, self.tuning_lr, self.tuning_optimizer
                params, lean = list(weights.values()), optimizer == "adafactor" or self.gradient_checkpointing
                curves = minimise(terms, params, steps, lr, optimizer, "tuning", "method.tuning_lr", reporter, lean)
                return on_cpu(weights), curves

        tuning = [self.tuning_steps, self.tuning_lr, self.tuning_optimizer, self.tuning_batch, self.tune]
        key = self.key(task, seed) | {"tuning": tuning, "rank": self.lora_rank if self.tune == "lora" else 0}
        weights, curves = cached_stage(reporter, "tuning", key, build)
        return (lora.merged(model.unet, weights) if self.tune == "lora" else weights), curves

    def tune_decoder(self, model, task, x, reporter) -> Stage:
        """Stage B, auxiliary network: min_phi ||D_phi(x) - image||_1 + ||D_phi(x) - image||_2^2 -> its
        weights.

        In a latent model the decoder D has the part of Imagen's super-resolution networks: it draws the
        detail that diffusion leaves out.
        """
        if self.decoder_steps == 0:
            return {}, {}
        image = task.image.to(x)

        def terms() -> dict[str, Tensor]:
            error = model.decode_latents(x).float() - image.float()
            return {"l1": error.abs().mean(), "l2": error.square().mean()}

        def build() -> Stage:
            names = [name for name, _ in model.autoencoder.named_parameters() if name.startswith("decoder.")]
            with trainable(model.autoencoder, names) as weights:
                params, steps, lr = list(weights.values()), self.decoder_steps, self.decoder_lr
                curves = minimise(terms, params, steps, lr, "adam", "decoder", "method.decoder_lr", reporter)
                return on_cpu(weights), curves

        key = {"method": "imagic", "decoder": [self.decoder_steps, self.decoder_lr]}
        return cached_stage(reporter, "decoder", key, build)

    def interpolate(self, model, x, e_tgt, e_opt, trajectory, reporter, seed) -> EditResult:
        """Stage C: sample under eta e_tgt + (1 - eta) e_opt (eq. 3). Sample i has one start for all etas, and
        takes embedding i modulo K."""
        null = model.encode_text([""])
        bar = partial(reporter.progress, total=len(trajectory))
        samples = range(self.num_samples)

        def e_of(i: int) -> Tensor:
            return e_opt[i % len(e_opt)][None]

        def start(i: int) -> Tensor:
            if self.start == "noise":
                return noise_like(x, generator(seed, "start", i))
            upward = partial(bar, stage="inversion")
            return ddim.invert(guided(model, e_of(i)), x, trajectory, progress=upward)

        def sample(eta: float, style_eta: float | None, i: int, stage: str) -> Tensor:
            def denoiser(eta: float) -> Denoiser:
                return guided(model, eta * e_tgt + (1 - eta) * e_of(i), null, self.guidance_scale)

            denoise = denoiser(eta)
            if style_eta is not None:
                denoise = switched(denoise, denoiser(style_eta), trajectory.timesteps, self.style_from)
            noise = generator(seed, "sampling", i)
            return self.sampler.sample(denoise, starts[i], trajectory, noise, partial(bar, stage=stage))

        style = {} if self.style_eta is None else {"style_eta": float(self.style_eta)}
        edits, latents = [], []
        with reporter.stage("editing"):
            starts = [start(i) for i in samples]
            for eta in self.eta if isinstance(self.eta, Iterable) else [self.eta]:
                for i in samples:
                    z = sample(eta, self.style_eta, i, "editing")
                    settings = {"eta": float(eta), "sample": i} | style
                    edits.append(Edit(to_image(model, z), settings, {"edit_source_cosine": cosine(z, x)}))
                    latents.append(z)
        with reporter.stage("reconstruction"):
            z = sample(0.0, None, 0, "reconstruction")
            reconstruction = to_image(model, z)
        metrics = {"reconstruction_source_cosine": cosine(z, x)}
        tensors = {"start_latents": torch.cat(starts), "edited_latents": torch.cat(latents)}
        return EditResult(edits, reconstruction, metrics, tensors)

    def key(self, task, seed: int) -> dict:
        """All that stage A depends on apart from model and image."""
        steps = [self.embedding_steps, self.embedding_lr, self.embedding_optimizer, self.embedding_init]
        extras = [self.embedding_noise, self.num_embeddings, self.clip_weight]
        return {"method": "imagic", "prompt": task.prompt, "seed": seed, "embedding": steps + extras}

    @contextmanager
    def tunable(self, unet: nn.Module, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        """What stage B moves: copies of the UNet's weights, or adapters. Afterwards the UNet is as before."""
        names = [name for name, _ in unet.named_parameters()]
        if self.tune == "attention":
            names = lora.in_attention(names)
        tuned = lora.adapters(unet, self.lora_rank, generator(seed, "lora")) if self.tune == "lora" else None
        with tuned or trainable(unet, names) as weights:
            yield weights


def on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values, where they wait for stage C: a card would have to hold them beside the untuned ones."""
    return {name: weight.detach().cpu() for name, weight in weights.items()}


def denoising_losses(model, x: Tensor, e: Tensor, noise: torch.Generator) -> Tensor:
    """||eps - eps_theta(x_t, t, e)||^2, the mean over elements, at one draw of t and eps for each embedding:
    x (1, c, h, w), e (B, L, C) -> (B,) float32."""
    t = torch.randint(model.schedule.timesteps, (len(e),), generator=noise).to(x.device)
    eps = noise_like(x.expand(len(e), -1, -1, -1), noise)
    x_t = model.schedule.add_noise(x, eps, t)
    error = model.predict_noise(x_t, t, e).float() - eps.float()
    return error.square().flatten(1).mean(dim=1)


def switched(early: Denoiser, late: Denoiser, timesteps: Tensor, fraction: float) -> Denoiser:
    """Style mixing: `early` for the first `fraction` of the steps, which lay the picture out, then `late`,
    which draws its details."""
    rest = set(timesteps[round(fraction * len(timesteps)) :].tolist())
    return lambda x, t: (late if int(t) in rest else early)(x, t)
