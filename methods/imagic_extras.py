"""Additions to Imagic: a CLIP term for the embedding, a decoder fitted to the image, and style mixing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from errors import InputError
from methods.base import Run
from methods.optimisation import restored, tune
from samplers import Denoiser, Trajectory


def clip_term(model, task, weight: float) -> Callable[[Tensor], dict[str, Tensor]]:
    """A function of text states (K, L, C): weight (1 - cos(CLIP of the states, CLIP of the image)), summed over rows;
    no term for weight 0. Raises InputError for a model without a CLIP image tower."""
    if weight == 0:
        return lambda states: {}
    if model.clip is None:
        raise InputError("method.clip_weight needs a model with a CLIP image tower, and this one has none")
    ids, image = model.text.tokenize([task.prompt]), model.clip.image_features(task.image.to(model.device))

    def term(states: Tensor) -> dict[str, Tensor]:
        agreement = (model.text.pool(states, ids.expand(len(states), -1)) * image).sum(dim=-1).float()
        return {"clip": weight * (1 - agreement).sum()}

    return term


@contextmanager
def fitted_decoder(model, z: Tensor, image: Tensor, steps: int, lr: float, run: Run) -> Iterator[None]:
    """Inside, phi = argmin_phi ||D_phi(z) - image||_1 + ||D_phi(z) - image||_2^2; afterwards the decoder is as before.
    Like the paper's auxiliary network, Imagen's super-resolution, it draws detail that diffusion leaves out."""
    names = [name for name, _ in model.autoencoder.named_parameters() if name.startswith("decoder.")]
    pixels = image.to(model.device).float()

    def loss() -> dict[str, Tensor]:
        error = model.decode_latents(z).float() - pixels
        return {"l1": error.abs().mean(), "l2": error.square().mean()}

    with restored(model.autoencoder, names if steps else []) as phi:
        if steps:
            tune(phi, loss, run, "decoder", {"method": "imagic", "steps": steps, "lr": lr}, steps, lr)
        yield


def style_mixed(early: Denoiser, late: Denoiser, trajectory: Trajectory, share: float) -> Denoiser:
    """`early` for the first `share` of the steps, which lay the picture out, then `late`, which draws its details."""
    details = set(trajectory.timesteps[round(share * len(trajectory)) :].tolist())
    return lambda x, t: (late if t in details else early)(x, t)
