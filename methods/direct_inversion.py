"""Direct Inversion: optimization-free editing of real images by text (Elarabawy et al., 2022, arXiv 2211.07825).

DDIM inverts the image under the empty prompt and records the noise predicted at each step. Sampling starts from the
inverted latent under the target prompt, and blends the recorded noise (of a flow model, the velocity) into its own:

    eps = eps_target + lambda (eps_recorded - eps_target),    lambda = 1 - edit_strength
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import InputError
from methods.base import RECONSTRUCTION, Method, Result, Run, check, cosine
from methods.direct_inversion_extras import cohere, other_grid, with_cosine
from samplers import Denoiser, Sampler, Trajectory, ddim, guided, noise_like


@dataclass
class DirectInversion(Method):
    """The reconstruction replays the recording: exact where the inversion took the sampler's steps."""

    sampler: Sampler  # steps both ways, and eta, the noise added while sampling
    edit_strength: float = 0.75  # [1 - lambda] 0 replays the recording (from the start below); 1 is the prompt alone
    blend: str = "noise"  # with what: noise (recorded at the same step) | latent (inverted)
    blend_fraction: float = 1.0  # the first part of the steps, which are blended; edit_strength=0 always takes all
    guidance_scale: float = 2.5  # classifier-free guidance [w]; 1 is without
    inversion_prompt: str = ""  # the prompt of the inversion, which has no guidance; or '${source_prompt}'
    inversion_steps: int | None = None  # steps of the inversion, if other than the sampler's
    fixed_point_steps: int = 0  # further network calls per step of the inversion, which make it exact
    # the start latent, from the inverted latent [z_x] and a fresh one [z_t]
    mix: str = "cosine"  # cosine | linear: alpha beta z_x + (1 - alpha) z_t | gaussian: drawn around that
    structural_similarity: float = 1.0  # for mix=cosine: cosine of start and inverted latent; 1 is the inverted latent
    alpha: float = 0.9  # for mix=linear, gaussian [alpha]: share of the image, against the fresh latent
    beta: float = 0.9  # for mix=linear, gaussian [beta]: share of z_x in it; gaussian turns the rest into variance
    diversity: float = 0.0  # noise on the start latent, its variance kept; 1 leaves noise only
    num_samples: int = 1  # edits, each with noise of its own (where there is any: see diversity)
    # after sampling
    semantic_coherence: float = 0.0  # weight of 1 - cos(CLIP of the picture, CLIP of the prompt); needs a CLIP
    coherence_steps: int = 20  # Adam steps on the edited latent, which a squared distance holds near its place
    coherence_lr: float = 0.02  # their learning rate, in units of the latent

    def __post_init__(self) -> None:
        shares = ["edit_strength", "blend_fraction", "structural_similarity", "alpha", "beta", "diversity"]
        choices = {"blend": ["noise", "latent"], "mix": ["cosine", "linear", "gaussian"]}
        check(self, shares=shares, counts=["num_samples", "inversion_steps"], **choices)
        for name in ("alpha", "beta") if self.mix == "cosine" else ("structural_similarity",):
            if getattr(self, name) != getattr(DirectInversion, name):
                raise InputError(f"method.{name} has no effect with method.mix={self.mix}")
        fresh = self.structural_similarity < 1 if self.mix == "cosine" else self.alpha < 1
        fresh = fresh or (self.mix == "gaussian" and self.beta < 1) or self.diversity > 0 or self.sampler.eta > 0
        if self.num_samples > 1 and not fresh:
            raise InputError(f"method.num_samples={self.num_samples} gives equal pictures: set sampler.eta above 0")

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        if self.semantic_coherence and model.clip is None:
            raise InputError("method.semantic_coherence needs a model with a CLIP image tower, and this one has none")
        if self.blend == "latent" and model.prediction == "flow":
            raise InputError("method.blend=latent takes the inverted latent for noise: a flow model's velocity is none")
        upward = trajectory = self.sampler.trajectory(model.schedule)
        if self.inversion_steps not in (None, len(trajectory)):
            upward = other_grid(model.schedule, trajectory, self.inversion_steps)
        empty = guided(model, self.inversion_prompt)
        recording = ddim.invert(empty, z, upward, self.fixed_point_steps, run.progress("inversion"))
        again = ddim.sample(recording.replay, recording.latent, trajectory)
        run.metrics["inverted_source_cosine"] = cosine(recording.latent, z)
        run.metrics["inverted_std"] = float(recording.latent.std())  # 1 where it is as noisy as it should be
        run.metrics["replay_error"] = float((again - z).abs().max())
        run.tensors["inverted_latent"] = recording.latent

        target = guided(model, task.prompt, self.guidance_scale, task.negative_prompt)
        starts = [self.start_latent(recording.latent, run.noise("start", i)) for i in range(self.num_samples)]
        run.tensors["start_latents"] = torch.cat(starts)
        for i, start in enumerate(starts):
            run.metrics["start_inverted_cosine"] = cosine(start, recording.latent)
            x = self.sample(target, start, recording, trajectory, run, i)
            if weight := self.semantic_coherence:
                stage = f"coherence_{i}" if self.num_samples > 1 else "coherence"  # each sample has curves of its own
                x = cohere(model, task.prompt, x, weight, self.coherence_steps, self.coherence_lr, run, stage)
            yield {"edit_strength": float(self.edit_strength), "sample": i}, x
        yield RECONSTRUCTION, again

    def sample(
        self, target: Denoiser, start: Tensor, recording: ddim.Inversion, trajectory: Trajectory, run: Run, i: int
    ) -> Tensor:
        """Sample with guidance from `start`, held to the recording with lambda = 1 - edit_strength; by `blend`:

        noise   eps + lambda (eps_recorded - eps), the noise recorded at the same step;
        latent  eps + lambda (z_x - eps), the inverted latent itself, which is nearly all noise.

        lambda is 0 after the first `blend_fraction` of the steps. Strength 0 is the recorded noise alone in all steps.
        """
        blended = round(self.blend_fraction * len(trajectory))
        lam = {t: (1 - self.edit_strength) * (step < blended) for step, t in enumerate(trajectory.timesteps.tolist())}

        def denoise(x: Tensor, t: int) -> Tensor:
            if self.edit_strength == 0:
                return recording.replay(x, t)
            eps = target(x, t)
            return eps + lam[t] * ((recording.replay(x, t) if self.blend == "noise" else recording.latent) - eps)

        return self.sampler.sample(denoise, start, trajectory, run.noise("sampling", i), run.progress("editing"))

    def start_latent(self, z_x: Tensor, noise: torch.Generator) -> Tensor:
        """Where sampling starts, from the inverted latent z_x and a fresh latent z_t ~ N(0, I):

        cosine    at the cosine `structural_similarity` to z_x, with its mean and variance (see `with_cosine`);
        linear    alpha beta z_x + (1 - alpha) z_t;
        gaussian  a draw with that mean and the variance alpha (1 - beta) var(z_x) + (1 - alpha) var(z_t), where
                  var is the variance over all elements of a latent.

        Finally fresh noise turns it, as in the first, to the cosine sqrt(1 - diversity^2) with itself.
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
