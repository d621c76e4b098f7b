"""Pictures in and out: any file Pillow can read -> (1, 3, H, W) in [-1, 1], and back to an 8-bit PNG.

Files of cameras and drawing programs are brought to one form first: turned upright by their EXIF orientation, the
first frame of an animation, 16-bit and float samples scaled to 8 bits, transparency laid over white, colour profiles
converted to sRGB, and any palette, grey or CMYK picture as RGB.
"""

import io
import itertools
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageCms, PngImagePlugin
from torch import Tensor

from errors import InputError

FITS = ("crop", "pad", "stretch")  # to a square
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
CLONE = Path(__file__).resolve().parent.parent
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # generators store over 1 MB of settings in their PNGs


def find(path: str | Path) -> Path:
    """`path` from the working directory, or else inside this clone: bundled files are found anywhere."""
    path = Path(path).expanduser()
    return CLONE / path if not path.exists() and (CLONE / path).exists() else path


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The picture at `path` with only its header read. Raises InputError, also for errors while it is decoded."""
    path = find(path)
    if not path.is_file():
        raise InputError(f"image '{path}': there is no such file (seen from {os.getcwd()})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice the limit is an error
            with Image.open(path) as image:
                yield image
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise InputError(f"image '{path}': not a picture that Pillow can read, or broken ({error})") from error


def open_upright(path: str | Path) -> Image.Image:
    """The picture at `path` in its own mode, turned upright."""
    with opened(path) as image:
        image.verify()  # the checksums of a PNG, which decoding does not compare
    with opened(path) as image:
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation)  # alone: the other entries may be malformed
        upright = image.transpose(TURNS[orientation]) if orientation in TURNS else image
        upright.format = image.format
        return upright


def open_rgb(path: str | Path) -> Image.Image:
    """The picture at `path` as an upright 8-bit sRGB image of its own size. Raises InputError if there is none."""
    image = open_upright(path)
    if image.mode[0] in "IF":  # Pillow's own conversion would clip these at 255
        return Image.fromarray(_to_bytes(np.asarray(image), image.mode)).convert("RGB")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    rgb = to_srgb(image)
    return rgb if alpha is None else Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def to_srgb(image: Image.Image) -> Image.Image:
    """`image` as RGB: by its colour profile where it has one other than sRGB that can be read."""
    icc = image.info.get("icc_profile")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc)) if icc else None
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(profile.profile.xcolor_space.strip()) if icc else None
        if mode and "sRGB" not in ImageCms.getProfileDescription(profile):
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image.convert(mode), profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, TypeError):  # a broken profile is ignored
        pass
    return image.convert("RGB")


def open_mask(path: str | Path) -> Image.Image:
    """The mask at `path` as an upright image of mode "L": 255 under any paint that is neither black nor transparent.

    A JPEG's black is noisy, so its paint must be brighter than 127. Warns where nothing or everything is inside.
    """
    image = open_upright(path)
    if image.mode[0] in "IF":
        inside = np.asarray(image) > 0
    else:
        pixels = np.asarray(image.convert("RGBA"))
        inside = (pixels[..., :3].max(-1) > (127 if image.format == "JPEG" else 0)) & (pixels[..., 3] > 0)
    if inside.all() or not inside.any():
        extent = "full: every" if inside.any() else "empty: no"
        warnings.warn(f"the mask {path} is {extent} pixel is painted", stacklevel=2)
    return Image.fromarray(inside.astype(np.uint8) * 255)


def _to_bytes(samples: np.ndarray, mode: str) -> np.ndarray:
    """Grey samples of 16 bits, 32 bits or floats as 8 bits. Files do not name their white, so it is the smallest
    customary one that no sample exceeds: 1 and 255 (floats only), 65535, 2^31 - 1."""
    samples = np.nan_to_num(samples.astype(np.float64), posinf=0.0, neginf=0.0)
    whites = (1.0, 255.0, 65535.0, 2.0**31 - 1) if mode == "F" else (65535.0, 2.0**31 - 1)
    white = next((w for w in whites if samples.max() <= w), samples.max())
    return np.rint(samples.clip(0) * (255.0 / white)).astype(np.uint8)


def bucket(width: int, height: int, size: int, multiple: int) -> tuple[int, int]:
    """The (width, height) in multiples of `multiple`, of an area of about size^2, nearest to the shape
    width : height. Where a side would vanish, it is one multiple."""
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
    """`image` as a model takes it, whose sides must be multiples of `multiple`.

    At size x size: the centre square ("crop"), all of it between white bars ("pad"), or squeezed ("stretch"). With
    "keep" all of it in about its own shape and size^2 pixels, its sides by `bucket`. A picture that has the size
    already keeps every pixel. Raises InputError for another `fit`, and as `check_size` does.
    """
    check_size(size, multiple)
    if fit not in (*FITS, "keep"):
        raise InputError(f"fit={fit} is unknown: choose from {', '.join(FITS)}, keep")
    width, height = image.size
    if fit == "keep":
        return image.resize(bucket(width, height, size, multiple), Image.Resampling.LANCZOS)
    if fit == "stretch":
        return image.resize((size, size), Image.Resampling.LANCZOS)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    scale = size / max(width, height)
    small = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS)
    square = Image.new(image.mode, (size, size), "white")
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square


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
    """The picture at `path` by `fit_picture` -> (1, 3, H, W) float32 in [-1, 1]. Raises InputError for a missing,
    broken or far too large file, and as `fit_picture` does."""
    return to_tensor(fit_picture(open_rgb(path), size, fit, multiple))
