"""Local blending of Prompt-to-Prompt ("Local editing"): the target stays the source where neither looks at its word."""

import torch
import torch.nn.functional as F
from torch import Tensor


class LocalBlend:
    """Collects cross-attention maps while a pair of latents is sampled, and blends the two after each step.

    The maps are those of all layers at the level above the UNet's lowest, which in Stable Diffusion at 512 pixels have
    16 x 16 places. They are summed over the steps so far, and over heads, layers and the tokens of a word.
    """

    def __init__(self, words: Tensor, sides: tuple[int, int], start: int, threshold: float):
        """words: (2, L), 1 at the tokens of the source's word and of the target's; sides: (height, width) of the maps;
        start: steps that are not blended; threshold: in [0, 1], of a map's maximum, above which a place is inside."""
        self.words, self.sides, self.start, self.threshold = words, sides, start, threshold
        self.maps = torch.zeros(2, sides[0] * sides[1], device=words.device)

    def collects(self, places: int) -> bool:
        """Whether a layer with so many places is one of those."""
        return places == self.maps.shape[1]

    def collect(self, maps: Tensor) -> None:
        """Add a layer's maps of source and target, (2, heads, N, L), as they are used, after the editing."""
        self.maps += torch.einsum("bhnl,bl->bn", maps, self.words.to(maps.dtype))

    def inside(self, shape: tuple[int, int]) -> Tensor:
        """Where either prompt looks at its word: (1, 1, *shape) of bool, for latents of that shape."""
        maps = F.max_pool2d(self.maps.unflatten(1, (1, *self.sides)), 3, stride=1, padding=1)
        maps = F.interpolate(maps, shape, mode="nearest")
        return (maps > self.threshold * maps.amax((2, 3), keepdim=True)).any(dim=0, keepdim=True)

    def __call__(self, i: int, x: Tensor) -> Tensor:
        """The latents x (2, c, h, w) of source and target after step i, with the source's outside."""
        return x if i < self.start else torch.where(self.inside(x.shape[-2:]), x, x[:1])
