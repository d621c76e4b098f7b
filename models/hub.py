"""The model hub's folder layout: which of a repository's files are needed, and fetching them.

A repository has one sub-folder for each network (`unet/`, `vae/`, `text_encoder/`), often with the same weights
several times: as safetensors and as pickles, in half precision, before the moving average, in one file or in shards.
"""

import re
from collections.abc import Iterable

from errors import InputError

# diffusion_pytorch_model.fp16-00001-of-00002.safetensors; older releases have the variant after the shard's number
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(fp16|bf16|non_ema))?"
    r"(?:-\d+-of-(\d+))?(?:\.(fp16|bf16|non_ema))?\.(safetensors|bin)"
)


def part_files(names: Iterable[str], part: str, half: bool = False, ema: bool | None = None) -> list[str]:
    """The weight file of one network, or all its shards in order, of the files `names` in the hub's layout.

    `names` are relative to the repository, with "/" ("unet/diffusion_pytorch_model.safetensors"); `part` is a
    sub-folder ("unet"). One complete set is chosen: safetensors before pickles; half precision only with `half` or
    where there is nothing else; for `ema=False` the weights before the moving average, where they are kept apart. A
    shard's name tells how many there are, so no index is read. Raises InputError where no set is complete, and for
    `ema=True` where nothing tells the moving average from the plain weights.
    """
    found: dict[tuple[str, int, str], list[str]] = {}  # (variant, number of shards or 0, kind) -> files
    for name in sorted(set(names)):
        folder, _, file = name.rpartition("/")
        if folder == part and (match := WEIGHTS.fullmatch(file)):
            variant, kind = match[1] or match[3] or "", match[4]
            found.setdefault((variant, int(match[2] or 0), kind), []).append(name)
    # where there is no number, there is one file, or the same under two names
    sets = {key: files if key[1] else files[:1] for key, files in found.items() if key[1] in (0, len(files))}
    if not sets:
        lacking = [f"of the {count} shards like {files[0]} only {len(files)}" for (_, count, _), files in found.items()]
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        raise InputError(
            f"{part}/ has no complete weights: " + "; ".join(lacking or [f"no {stem}.safetensors or the like"])
        )
    smoothed = {variant != "non_ema" for variant, _, _ in sets}
    if ema and part == "unet" and smoothed != {True, False}:
        raise InputError("nothing says that the weights in unet/ are a moving average: leave ema unset")

    def rank(key: tuple[str, int, str]) -> tuple[bool, ...]:
        variant, count, kind = key
        return (variant == "non_ema") != (ema is False), (variant in ("fp16", "bf16")) != half, kind == "bin", count > 0

    return sets[min(sets, key=rank)]
