"""Where a model computes, and in what precision, from the names that users type."""

import re

import torch

from errors import InputError


def choose_device(name: str) -> torch.device:
    """auto: CUDA where there is a device for it, else the CPU. Raises InputError for one that is not there, and for
    the kinds that torch knows and this project was never run on (mps, xpu, meta)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    known = re.fullmatch(r"cpu|cuda(?::(0|[1-9]\d*))?", str(name))
    if not known:
        raise InputError(f"device={name} is unknown: auto, cpu, cuda or cuda:N")
    # Counted before torch reads the name: it takes cuda:256 for cuda:0.
    if name != "cpu" and int(known[1] or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"device={name}: this machine has {count} CUDA devices; try device=cpu")
    return torch.device(name)


def choose_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16. Raises InputError for another name."""
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype={name} is unknown: float32, bfloat16 or float16")
    return getattr(torch, name)
