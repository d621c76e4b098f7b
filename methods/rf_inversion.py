"""RF-Inversion: semantic image inversion and editing using rectified SDEs (Rout et al., 2024, arXiv 2410.10792).

A flow is inverted and sampled again, each time with its velocity v drawn towards the end that is known: up to a
Gaussian sample y_1 (algorithm 1), and down to the picture y_0 (algorithm 2). Here sigma is the paper's t on the way up
and 1 - t on the way down, where the paper's velocity has the other sign:

    dY / dsigma = v(Y) + gamma ((y_1 - Y) / (1 - sigma) - v(Y))    from Y = y_0 at sigma = 0    (eq. 8)
    dX / dsigma = v(X) + eta ((X - y_0) / sigma - v(X))            from the top                  (eq. 15)
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from methods.base import RECONSTRUCTION, Method, Result, Run, check_invertible
from samplers import Sampler, as_velocity, ddim, guided, noise_like


@dataclass
class RFInversion(Method):
    """The authors' defaults with less guidance. The reconstruction is the latent itself, as with eta=1 and stop=1."""

    sampler: Sampler  # without noise (eta 0): steps both ways
    gamma: float = 0.5  # [gamma] on the way up, under the empty prompt: 0 is plain inversion, 1 leads straight to y_1
    eta: float = 0.9  # [eta] on the way down: 0 is plain sampling, 1 leads straight to the picture
    start: float = 0.0  # [s] share of the steps down before eta acts
    stop: float = 0.25  # [tau] share of the steps after which it stops; a later stop keeps more of the picture
    guidance_scale: float = 1.5  # classifier-free guidance on the way down; 1 is without
    num_samples: int = 1  # edits, each by a Gaussian sample of its own

    def __post_init__(self) -> None:
        check_invertible(self, shares=["gamma", "eta", "start", "stop"], counts=["num_samples"])

    def edit(self, model, task, z: Tensor, run: Run) -> Iterator[Result]:
        trajectory = self.sampler.trajectory(model.schedule).as_flow()
        steps = {t: n for n, t in enumerate(trajectory.timesteps.tolist())}
        sigmas, as_empty = trajectory.levels.tolist(), as_velocity(guided(model, ""), model.schedule)
        as_target = as_velocity(guided(model, task.prompt, self.guidance_scale, task.negative_prompt), model.schedule)
        for i in range(self.num_samples):
            y_1 = noise_like(z, run.noise("y_1", i))

            def up(y: Tensor, t: float, y_1=y_1) -> Tensor:
                v = as_empty(y, t)
                return v + self.gamma * ((y_1 - y) / (1 - sigmas[steps[t] + 1]) - v)  # y is at the lower level

            def down(x: Tensor, t: float) -> Tensor:
                n, v = steps[t], as_target(x, t)
                eta = self.eta * (self.start <= n / len(trajectory) < self.stop)
                return v + eta * ((x - z) / sigmas[n] - v)

            top = ddim.invert(up, z, trajectory, progress=run.progress("inversion")).latent
            run.tensors["inverted_latent"] = top
            x = ddim.sample(down, top, trajectory, progress=run.progress("editing"))
            yield {"eta": float(self.eta), "stop": float(self.stop), "sample": i}, x
        yield RECONSTRUCTION, z
