"""Where a model computes and in what precision, from the names that users type."""

import os
import re
from pathlib import Path

import torch

from errors import InputError


def choose_device(name: str) -> torch.device:
    """auto: CUDA where there is a device for it, else the CPU. Under torchrun, auto and cuda are this process's own
    card: the cards are dealt out in turn, by LOCAL_RANK. Raises InputError for devices not there, and other kinds."""
    count = torch.cuda.device_count()
    name = ("cuda" if count else "cpu") if name == "auto" else name
    known = re.fullmatch(r"cpu|cuda(?::(0|[1-9]\d*))?", str(name))
    if not known:
        raise InputError(f"device={name} is unknown: auto, cpu, cuda or cuda:N")
    # Counted before torch reads the name: it takes cuda:256 for cuda:0.
    if name != "cpu" and int(known[1] or 0) >= count:
        raise InputError(f"device={name}: this machine has {count} CUDA devices; try device=cpu")
    if name == "cuda" and os.environ.get("LOCAL_RANK", "").isdecimal():
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % count}"
    return torch.device(name)


def choose_dtype(name: str, device: torch.device, large: bool = False) -> torch.dtype:
    """float32, bfloat16 or float16. auto: bfloat16, where the device has instructions for it; else float16 on CUDA and
    float32 on a CPU. On a CPU, networks that are not `large` are as fast in float32, and stay in it. Raises InputError
    for another name, and for half precision that a CPU has no instructions for."""
    if name == "auto":
        cuda = device.type == "cuda"
        half = (cuda or large) and computes_in("bfloat16", device)
        name = "bfloat16" if half else "float16" if cuda else "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype={name} is unknown: auto, float32, bfloat16 or float16")
    if name != "float32" and device.type == "cpu" and not computes_in(name, device):
        raise InputError(f"dtype={name}: this CPU has no instructions for it, and would be slow; choose float32")
    return getattr(torch, name)


def computes_in(name: str, device: torch.device) -> bool:
    """Whether the device has instructions for this half precision; on a CPU only Linux says so."""
    if device.type == "cuda":
        return name != "bfloat16" or torch.cuda.is_bf16_supported(including_emulation=False)
    file = Path("/proc/cpuinfo")
    flags = set(file.read_text().split()) if file.exists() else set()
    return bool(flags & {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "float16": {"avx512_fp16", "asimdhp"}}[name])
