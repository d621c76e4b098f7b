"""What CLIP (Radford et al., 2021) sees in an edit: cosines, (B,). Images are (B, 3, H, W) in [-1, 1]."""

from collections.abc import Sequence

from torch import Tensor

from metrics.pixels import black_but


def clip_score(clip, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The cosine between the features of each image and of its prompt (Hessel et al., 2021, without their factor of
    2.5)."""
    return (clip.image_features(images) * clip.text_features(prompts)).sum(-1)


def clip_margin(clip, images: Tensor, source_prompt: str, prompt: str) -> Tensor:
    """By how much the score under the target prompt is above that under the source prompt, in [-2, 2]."""
    target, source = clip.text_features([prompt, source_prompt])
    return clip.image_features(images) @ (target - source)


def clip_similarity(clip, a: Tensor, b: Tensor, kept: Tensor | None = None) -> Tensor:
    """The cosine between the image features of a and b, which are black where they are not kept."""
    return (clip.image_features(black_but(a, kept)) * clip.image_features(black_but(b, kept))).sum(-1)


def clip_directional(clip, source: Tensor, edit: Tensor, source_prompt: str, prompt: str) -> Tensor:
    """The cosine between the change of the images' features and that of the prompts' (Gal et al., 2021, arXiv
    2108.00946, section 4.1); NaN where either did not change."""
    seen = clip.image_features(edit) - clip.image_features(source)
    meant = clip.text_features([prompt]) - clip.text_features([source_prompt])
    return (seen * meant).sum(-1) / (seen.norm(dim=-1) * meant.norm(dim=-1))
