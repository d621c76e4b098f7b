"""Pictures in and out: any file Pillow can read -> (1, 3, H, W) in [-1, 1], and back to an 8-bit PNG.

Whatever a camera or a drawing program wrote is brought to one form first: turned upright by its EXIF tag, its
first frame if it moves, 16-bit and float samples scaled to 8 bits, transparency laid over white, and any
palette, grey or CMYK picture as RGB.
"""

import itertools
import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from errors import InputError

FITS = ("crop", "pad", "stretch")  # to a square
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error)
CLONE = Path(__file__).resolve().parent.parent


def find(path: str | Path) -> Path:
    """`path` from where the user stands, or else inside this clone: bundled things are found anywhere."""
    path = Path(path).expanduser()
    return CLONE / path if not path.exists() and (CLONE / path).exists() else path


def open_rgb(path: str | Path) -> Image.Image:
    """The picture at `path` as an upright 8-bit RGB image of its own size; InputError if there is none."""
    path = find(path)
    if not path.is_file():
        raise InputError(f"image '{path}': there is no such file (seen from {os.getcwd()})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice the limit is an error
            with Image.open(path) as image:
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise InputError(f"image '{path}': over {limit} million pixels; scale it down first") from None
    except UnidentifiedImageError:
        raise InputError(f"image '{path}': not a picture that Pillow can read (PNG, JPEG, ...)") from None
    except BROKEN as error:
        raise InputError(f"image '{path}': cannot be read, the file may be broken ({error})") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # Pillow's own conversion would clip these at 255
        image = Image.fromarray(_to_bytes(np.asarray(image), image.mode))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _to_bytes(samples: np.ndarray, mode: str) -> np.ndarray:
    """Grey samples of 16 bits, 32 bits or floats as 8 bits. Files do not say what white is, so the smallest
    customary white that none exceeds is taken: 1 and 255 (floats only), 65535, 2^31 - 1."""
    samples = np.nan_to_num(samples.astype(np.float64), posinf=0.0, neginf=0.0)
    whites = (1.0, 255.0, 65535.0, 2.0**31 - 1) if mode == "F" else (65535.0, 2.0**31 - 1)
    white = next((w for w in whites if samples.max() <= w), samples.max())
    return np.rint(samples.clip(0) * (255.0 / white)).astype(np.uint8)


def fit_square(image: Image.Image, size: int, fit: str = "crop") -> Image.Image:
    """`image` at size x size: the centre square ("crop"), all of it between white bars ("pad"), or squeezed
    ("stretch"). A picture that has the size already keeps every pixel."""
    if fit not in FITS:
        raise InputError(f"fit={fit} is unknown: choose from {', '.join(FITS)}")
    width, height = image.size
    if fit == "stretch":
        return image.resize((size, size), Image.Resampling.LANCZOS)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        return image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    scale = size / max(width, height)
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    small = image.resize(shape, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), "white")
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square


def bucket(width: int, height: int, size: int, multiple: int) -> tuple[int, int]:
    """The (width, height) in multiples of `multiple`, of an area of about size^2, that come nearest to the shape
    width : height. Of pictures so thin that a side would vanish, that side is one multiple."""
    most = size / multiple
    root = min(max(math.sqrt(width / height), 1 / most), most)
    sides = [(math.floor(side), math.ceil(side)) for side in (most * root, most / root)]

    def strain(shape: tuple[int, int]) -> tuple[float, float]:
        return abs(math.log(shape[0] / shape[1] / root**2)), abs(math.log(shape[0] * shape[1] / most**2))

    wide, high = min((shape for shape in itertools.product(*sides) if all(shape)), key=strain)
    return wide * multiple, high * multiple


def check_size(size: int, multiple: int) -> None:
    """Raise InputError unless `size` is a whole number of pixels and a multiple of `multiple`."""
    if not isinstance(size, int) or size < 1 or size % multiple:
        raise InputError(f"size={size}: the side in pixels must be a multiple of {multiple} for this model")


def fit_picture(image: Image.Image, size: int, fit: str = "crop", multiple: int = 1) -> Image.Image:
    """`image` as a model takes it, whose sides must be multiples of `multiple`: size x size by `fit_square`, or with
    "keep" all of it in about its own shape and size^2 pixels, its sides in the nearest `bucket`."""
    check_size(size, multiple)
    if fit == "keep":
        return image.resize(bucket(*image.size, size, multiple), Image.Resampling.LANCZOS)
    return fit_square(image, size, fit)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image -> (1, 3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return rearrange(pixels, "h w c -> 1 c h w").float() / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) or (1, 3, H, W) in [-1, 1] -> an 8-bit RGB image; values beyond the range are clamped."""
    image = image.detach().float().cpu().reshape(image.shape[-3:])
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy())


def read_image(path: str | Path, size: int, fit: str = "crop", multiple: int = 1) -> Tensor:
    """The picture at `path` by `fit_picture` -> (1, 3, H, W) float32 in [-1, 1]; H and W are `size` unless `fit` is
    "keep".

    `fit` is "crop", "pad", "stretch" or "keep". Raises InputError for a missing, broken or far too large file, and
    for a size that is no multiple of `multiple`.
    """
    return to_tensor(fit_picture(open_rgb(path), size, fit, multiple))
