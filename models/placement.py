"""Where a model computes, in what precision and layout, from the names that users type."""

import ctypes
import re
import sys

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


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """float32, bfloat16 or float16; auto: bfloat16 on CUDA, float32 on a CPU. Raises InputError for another name."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype={name} is unknown: auto, float32, bfloat16 or float16")
    return getattr(torch, name)


def choose_channels_last(name: str | bool, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether feature maps lie channels last. auto: on a CPU, where `models/layers.py` is fastest so, and on CUDA in
    half precision, whose convolutions want it. Raises InputError for another name."""
    if name == "auto":
        return device.type == "cpu" or dtype != torch.float32
    if not isinstance(name, bool):
        raise InputError(f"channels_last={name} is unknown: auto, true or false")
    return name


def keep_memory() -> None:
    """Let this process keep the memory it frees for what it allocates next. As the GNU C library is set up it goes
    back to the system and comes again page by page, zeroed, at each large tensor: a tenth of the time of a Stable
    Diffusion step on a CPU, a third of a tuning step of a small model. For programs that end with their work."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "gnu_get_libc_version"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
