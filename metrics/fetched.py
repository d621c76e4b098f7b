"""What needs trained weights that a library fetches at first use: LPIPS, the structure distance and a public CLIP.

LPIPS and the structure distance are those of PIE-Bench's own evaluation (Ju et al., 2023, arXiv 2310.01506).
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metrics.pixels import black_but


class Lpips:
    """LPIPS (Zhang et al., 2018) on SqueezeNet's features, 0 for equal, black where pictures are not kept."""

    def __init__(self, device: torch.device):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.distance = LearnedPerceptualImagePatchSimilarity(net_type="squeeze").to(device).eval()

    def __call__(self, a: Tensor, b: Tensor, kept: Tensor | None = None) -> float:
        return self.distance(black_but(a, kept).float(), black_but(b, kept).float()).item()


class StructureDistance:
    """How far apart the layouts of two pictures are (Tumanyan et al., 2022, arXiv 2201.00424, equation 3): the mean
    squared difference of the matrices S of cosines between the keys of all tokens, in the last layer of a DINO ViT-B/8
    that sees them at 224 pixels. 0 for equal; PIE-Bench's tables show it times 1000.

    To compare with those tables, what the network sees is what PIE-Bench's code gives it: pixels from 0 to 255, less
    ImageNet's mean and over its deviation, which are meant for 0 to 1; and reduced without a filter against aliasing,
    as torchvision 0.13 does. So the numbers are not those of Tumanyan et al."""

    def __init__(self, device: torch.device, name: str = "vit_base_patch8_224.dino", pretrained: bool = True):
        import timm

        self.vit = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
        self.vit = self.vit.to(device).eval().requires_grad_(False)
        self.mean, self.std = (
            torch.tensor(v, device=device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )

    def __call__(self, a: Tensor, b: Tensor) -> float:
        return F.mse_loss(self.self_similarity(a), self.self_similarity(b)).item()

    def self_similarity(self, image: Tensor) -> Tensor:
        """(1, 3, H, W) in [-1, 1] -> S, (1, N, N), N the patches and the class token."""
        patch, shorter = self.vit.patch_embed.patch_size[0], min(image.shape[-2:])
        size = [round(side * 224 / shorter / patch) * patch for side in image.shape[-2:]]
        image = F.interpolate((image.float() + 1) * 127.5, size, mode="bilinear")
        projected = []
        hook = self.vit.blocks[-1].attn.qkv.register_forward_hook(lambda *call: projected.append(call[-1]))
        try:
            self.vit((image - self.mean) / self.std)
        finally:
            hook.remove()
        keys = F.normalize(projected[0].chunk(3, dim=-1)[1], dim=-1)  # the heads' keys side by side
        return keys @ keys.mT


def public_clip(device: torch.device) -> nn.Module:
    """OpenAI's CLIP ViT-L/14, which PIE-Bench scores with."""
    import open_clip

    from models.text import Clip, TextEncoder

    towers = open_clip.create_model("ViT-L-14-quickgelu", pretrained="openai", force_custom_text=True, device=device)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    clip = Clip(towers.visual, TextEncoder(towers.text), towers.visual.image_size[0], mean, std)
    return clip.to(device).eval().requires_grad_(False)


LOADERS = {"lpips": Lpips, "structure_distance": StructureDistance, "clip": public_clip}


@cache
def fetched(name: str, device: torch.device) -> tuple[Callable | None, str]:
    """What `name` stands for and "", or None and why it is not to be had, in one line."""
    try:
        return LOADERS[name](device), ""
    except ImportError as error:
        return None, f"{error.name or error} is missing: pip install -e '.[metrics]'"
    except Exception as error:  # no network, a full disk: each library has errors of its own, and none may cost a run
        told = " ".join(str(error).split())[:200]
        return None, f"its weights could not be fetched ({type(error).__name__}: {told})"
