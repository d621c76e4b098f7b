"""Direct Inversion: optimization-free editing of real images by text (Elarabawy et al., arXiv 2211.07825).

DDIM inverts the image under the empty prompt, and the noise predicted at each step is kept. Sampling then
starts from the inverted latent under the target prompt, and blends the recorded noise into its own:

    eps = eps_target + lambda (eps_recorded - eps_target),    lambda = 1 - edit_strength

so that the prompt changes what it must while the recording holds the rest in place. Nothing is trained.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import InputError
from methods.base import (
    Edit,
    EditResult,
    Reporter,
    any_kernels,
    check,
    check_choice,
    cosine,
    frozen,
    generator,
    minimise,
    source_latent,
    to_image,
)
from samplers import Denoiser, NoiseSchedule, Sampler, Trajectory, ddim, guided, noise_like


@dataclass
class DirectInversion:
    """The settings. conf/method/direct_inversion.yaml says what each one does and its symbol. Raises
    InputError for one that is out of range, for one that belongs to another `mix` than the chosen, and for a
    sampler other than DDIM, whose path alone can be walked both ways."""

    sampler: Sampler
    edit_strength: float = 0.5
    blend: str = "noise"  # noise | latent | path
    blend_fraction: float = 1.0  # of the steps
    guidance_scale: float = 3.0
    inversion_prompt: str = ""
    inversion_steps: int | None = None  # None: the sampler's
    fixed_point_steps: int = 0
    # the start latent
    mix: str = "cosine"  # cosine | linear | gaussian
    structural_similarity: float = 1.0  # for mix=cosine
    alpha: float = 0.9  # for mix=linear and mix=gaussian only
    beta: float = 0.9  # for mix=linear and mix=gaussian only
    diversity: float = 0.0
    num_samples: int = 1
    # after sampling
    semantic_coherence: float = 0.0
    coherence_steps: int = 20
    coherence_lr: float = 0.02

    def __post_init__(self) -> None:
        check(self, "edit_strength", "blend_fraction", "structural_similarity", high=1)
        check(self, "alpha", "beta", "diversity", high=1)
        check(self, "semantic_coherence", "coherence_lr", "guidance_scale")
        check(self, "coherence_steps", "fixed_point_steps", whole=True)
        check(self, "num_samples", low=1, whole=True)
        check_choice(self, ("noise", "latent", "path"), "blend")
        check_choice(self, ("cosine", "linear", "gaussian"), "mix")
        if self.inversion_steps is not None:
            check(self, "inversion_steps", low=1, whole=True)
        if self.blend == "path" and self.inversion_steps not in (None, self.sampler.steps):
            raise InputError(
                f"method.inversion_steps is {self.inversion_steps}: method.blend=path needs the latents of the very "
                "steps that are sampled; choose noise or latent"
            )
        if self.mix != "cosine" and self.structural_similarity != 1:
            raise InputError(
                f"method.structural_similarity is {self.structural_similarity}, which only method.mix=cosine "
                f"obeys: with method.mix={self.mix} set method.alpha and method.beta instead"
            )
        for name in ("alpha", "beta"):
            if self.mix == "cosine" and getattr(self, name) != getattr(DirectInversion, name):
                raise InputError(
                    f"method.{name} is {getattr(self, name)}, which only method.mix=linear and method.mix=gaussian "
                    "obey: with method.mix=cosine set method.structural_similarity instead"
                )
        if not isinstance(self.inversion_prompt, str):
            raise InputError(
                f"method.inversion_prompt is {self.inversion_prompt}: it must be a text, nothing after the = sign "
                "for the empty one (and where it is to be source_prompt, that must be given)"
            )
        fresh = self.alpha < 1 or (self.mix == "gaussian" and self.beta < 1)  # a share of noise in the start latent
        if self.mix == "cosine":
            fresh = self.structural_similarity < 1
        if self.num_samples > 1 and not (fresh or self.diversity > 0 or self.sampler.eta > 0):
            raise InputError(
                f"method.num_samples is {self.num_samples}, and all would be one picture: set method.diversity or "
                "sampler.eta above 0, or method.structural_similarity below 1"
            )
        if self.sampler.kind != "ddim":
            raise InputError(f"sampler.kind is {self.sampler.kind}: Direct Inversion needs ddim")

    def edit(self, model, task, reporter: Reporter = Reporter(), seed: int = 0) -> EditResult:
        """`num_samples` edits. The reconstruction replays the recording from the inverted latent, as the edit with
        strength 0 does where it starts there (see `sample`); it is exact if the inversion took the sampler's steps.

        Raises InputError if the result is not finite, or if `semantic_coherence` asks for a CLIP that the
        model does not have.
        """
        if self.semantic_coherence and model.clip is None:
            raise InputError(
                "method.semantic_coherence needs a model with a CLIP image tower, and this one has none: set it to 0"
            )
        with frozen(model), torch.no_grad():
            z_0 = source_latent(model, task.image)
            trajectory = self.sampler.trajectory(model.schedule)
            upward = trajectory
            if self.inversion_steps not in (None, len(trajectory)):
                upward = other_grid(model.schedule, trajectory, self.inversion_steps)
            with reporter.stage("inversion"):
                empty = guided(model, model.encode_text([self.inversion_prompt]))
                bar = partial(reporter.progress, stage="inversion", total=len(upward))
                recording = ddim.record(empty, z_0, upward, self.fixed_point_steps, bar)
            with reporter.stage("editing"):
                null, context = (model.encode_text([text]) for text in ("", task.prompt))
                target = guided(model, context, null, self.guidance_scale)
                edits, starts, latents = [], [], []
                for i in range(self.num_samples):
                    start = self.start_latent(recording.latent, generator(seed, "start", i))
                    noise = generator(seed, "sampling", i)
                    z = self.sample(target, start, recording, trajectory, noise, reporter)
                    metrics = {"start_inverted_cosine": cosine(start, recording.latent)}
                    if self.semantic_coherence:
                        z, agreement = self.cohere(model, task.prompt, z, reporter, i)
                        metrics |= agreement
                    metrics["edit_source_cosine"] = cosine(z, z_0)
                    settings = {"edit_strength": float(self.edit_strength), "sample": i}
                    edits.append(Edit(to_image(model, z), settings, metrics))
                    starts.append(start)
                    latents.append(z)
            with reporter.stage("reconstruction"):
                again = ddim.sample(recording.replay, recording.latent, trajectory)
                reconstruction = to_image(model, again)

        metrics = {name: sum(e.metrics[name] for e in edits) / len(edits) for name in edits[0].metrics}
        metrics["inverted_source_cosine"] = cosine(recording.latent, z_0)
        metrics["inverted_std"] = float(recording.latent.std())  # 1 where it is as noisy as it should be
        metrics["replay_error"] = float((again - z_0).abs().max())
        tensors = {"source_latent": z_0, "inverted_latent": recording.latent}
        tensors |= {"start_latents": torch.cat(starts), "edited_latents": torch.cat(latents)}
        return EditResult(edits, reconstruction, metrics, tensors)

    def sample(self, target: Denoiser, start: Tensor, recording: ddim.Inversion, trajectory, noise, reporter) -> Tensor:
        """Guided sampling from `start` that is held to the recording, with lambda = 1 - edit_strength. By
        `blend`:

        noise   eps + lambda (eps_recorded - eps), the noise recorded at the same step;
        latent  eps + lambda (z_x - eps), the inverted latent itself, which is nearly all noise;
        path    after each step x + lambda (x_recorded - x), the latent that the inversion passed there.

        lambda is 0 after the first `blend_fraction` of the steps. Strength 0 means the recording's noise
        alone in all of them, whatever the blend and the fraction. That is the reconstruction, exactly, if
        the start is the inverted latent (mix=cosine, structural_similarity=1, diversity=0), sampling adds
        no noise (the sampler's eta is 0), and the inversion took the same steps.
        """
        steps = len(trajectory)
        lam = [1 - self.edit_strength if i < round(self.blend_fraction * steps) else 0.0 for i in range(steps)]
        step_at = {int(t): i for i, t in enumerate(trajectory.timesteps)}

        def denoise(x: Tensor, t: int) -> Tensor:
            i = step_at[int(t)]
            if self.edit_strength == 0:
                return recording.replay(x, t)
            eps = target(x, t)
            if self.blend == "noise":
                return eps + lam[i] * (recording.replay(x, t) - eps)
            return eps + lam[i] * (recording.latent - eps) if self.blend == "latent" else eps

        def after(i: int, x: Tensor) -> Tensor:
            return x + lam[i] * (recording.latents[i + 1] - x) if self.blend == "path" else x

        bar = partial(reporter.progress, stage="editing", total=steps)
        return self.sampler.sample(denoise, start, trajectory, noise, bar, after)

    def start_latent(self, z_x: Tensor, noise: torch.Generator) -> Tensor:
        """Where sampling starts, from the inverted latent z_x and a fresh latent z_t ~ N(0, I):

        cosine    at the cosine `structural_similarity` to z_x, with its mean and variance (see `with_cosine`);
        linear    alpha beta z_x + (1 - alpha) z_t;
        gaussian  a draw with that mean and the variance alpha (1 - beta) var(z_x) + (1 - alpha) var(z_t), where
                  var is the variance over all elements of a latent.

        Then noise of its own turns it, in the manner of the first, to the cosine sqrt(1 - diversity^2).
        """
        a, b, z = self.alpha, self.beta, z_x
        if self.mix == "cosine" and self.structural_similarity < 1:
            z = with_cosine(z_x, noise_like(z_x, noise), self.structural_similarity)
        elif self.mix != "cosine":
            z_t = noise_like(z_x, noise)
            z = a * b * z_x + (1 - a) * z_t
            if self.mix == "gaussian":
                variance = a * (1 - b) * z_x.var() + (1 - a) * z_t.var()
                z = z + variance.sqrt() * noise_like(z_x, noise)
        if self.diversity > 0:
            z = with_cosine(z, noise_like(z_x, noise), math.sqrt(1 - self.diversity**2))
        return z

    def cohere(self, model, prompt: str, z_edit: Tensor, reporter, i: int) -> tuple[Tensor, dict[str, float]]:
        """Pull the edited latent towards the target text, as CLIP sees it, without going far; w =
        semantic_coherence:

            min_z  w (1 - cos(CLIP(D(z)), CLIP(prompt))) + mean (z - z_edit)^2

        Returns the latent, and CLIP's cosines before and after.
        """
        text = model.clip.text_features([prompt])
        z = z_edit.float().clone().requires_grad_()

        def agreement() -> Tensor:
            return (model.clip.image_features(model.decode_latents(z.to(model.dtype))) * text).sum().float()

        def terms() -> dict[str, Tensor]:
            distance = F.mse_loss(z, z_edit.float())
            return {"clip": self.semantic_coherence * (1 - agreement()), "distance": distance}

        before, steps, lr = float(agreement()), self.coherence_steps, self.coherence_lr
        stage = f"coherence_{i}" if self.num_samples > 1 else "coherence"  # each sample has curves of its own
        # A picture of another size than CLIP's is resampled for it, whose gradient CUDA adds up in any order.
        sides = {side * model.autoencoder.downsampling for side in z.shape[-2:]}
        resampled = sides != {model.clip.image_size}
        with any_kernels() if resampled else nullcontext():
            minimise(terms, [z], steps, lr, "adam", stage, "method.coherence_lr", reporter)
        return z.detach().to(z_edit), {"clip_cosine_before": before, "clip_cosine_after": float(agreement())}


def other_grid(schedule: NoiseSchedule, trajectory: Trajectory, steps: int) -> Trajectory:
    """`steps` timesteps, evenly spaced, from the first of `trajectory` down, that end where it ends: another walk
    between the same two noise levels. Raises InputError for more than there are timesteps."""
    levels = int(trajectory.timesteps[0]) + 1
    if steps > levels:
        raise InputError(f"method.inversion_steps is {steps}: below the sampler's first timestep there are {levels}")
    timesteps = torch.tensor([round((steps - i) * levels / steps) - 1 for i in range(steps)])
    return Trajectory(timesteps, torch.cat([schedule.alpha_bars[timesteps], trajectory.alpha_bars[-1:]]))


def with_cosine(z: Tensor, noise: Tensor, s: float) -> Tensor:
    """A latent at the cosine s in [0, 1] to z, exactly, with z's mean and variance, and so its norm.

    s z + sqrt(1 - s^2) o, with o as long as z and at a right angle to it: the noise made so, but for its part
    along u, the constant latent made orthogonal to z, which is set such that the mean stays. Where |mean| is
    so far above the standard deviation that it cannot, the cosine and the norm are exact all the same. In
    float64.
    """
    flat, n = (v.detach().cpu().double().flatten() for v in (z, noise))
    z_hat = F.normalize(flat, dim=0)
    one_hat = torch.full_like(flat, len(flat) ** -0.5)
    u = one_hat - (one_hat @ z_hat) * z_hat
    u_hat = F.normalize(u, dim=0)
    n = n - (n @ z_hat) * z_hat
    n_hat = F.normalize(n - (n @ u_hat) * u_hat, dim=0)
    # mean(s z + sqrt(1 - s^2) o) = mean(z), solved for the cosine of o and u
    c = float((one_hat @ z_hat) / u.norm().clamp(min=1e-12)) * math.sqrt((1 - s) / (1 + s))
    c = c if abs(c) <= 1 else 0.0
    o = flat.norm() * (c * u_hat + math.sqrt(1 - c**2) * n_hat)
    return (s * flat + math.sqrt(1 - s**2) * o).reshape(z.shape).to(z)
