"""Pictures in and out: any file Pillow can read -> (1, 3, H, W) in [-1, 1], and back to an 8-bit PNG.

Files of cameras and drawing programs are brought to one form first: turned upright by their EXIF orientation, the
first frame of an animation, 16-bit and float samples scaled to 8 bits, transparency laid over white, colour profiles
converted to sRGB, and any palette, grey or CMYK picture as RGB.
"""

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin
from torch import Tensor

from errors import InputError
from files import CLONE

FITS = {"crop": ImageOps.fit, "pad": partial(ImageOps.pad, color="white"), "stretch": Image.Image.resize}
TURNS = dict(zip((2, 4, 8, 3, 6, 5, 7), Image.Transpose, strict=True))  # EXIF's orientations, in Pillow's order
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # generators store over 1 MB of settings in their PNGs


def find(path: str | Path) -> Path:
    """`path` from the working directory, or else inside this clone. Raises InputError for a number or a list."""
    if not isinstance(path, str | Path):
        raise InputError(f"{path} is no path: image, mask, model.weights, .vae and .text name files")
    path = Path(path).expanduser()
    return CLONE / path if not path.exists() and (CLONE / path).exists() else path


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The picture at `path` with only its header read. Raises InputError, also for errors while it is decoded."""
    path = find(path)
    if not path.is_file():
        raise InputError(f"image '{path.absolute()}': there is no such file")
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # each of Pillow's decoders has its own
        raise InputError(f"image '{path}': not a picture that Pillow can read, or broken ({error})") from error


def size_of(path: str | Path) -> tuple[int, int]:
    """The (width, height) of the upright picture at `path`, of which only the header is read."""
    with opened(path) as image:
        exif = Image.Image.getexif(image)  # that of a PNG would decode it first
        return image.size[:: -1 if exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8) else 1]


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
    if image.mode[0] in "IF":  # 16 bits, or floats up to 1 or 255: Pillow's own conversion would clip these
        samples = np.nan_to_num(np.asarray(image, np.float64))
        white = 65535 if image.mode[0] == "I" else 1 if samples.max() <= 1 else 255
        return Image.fromarray(np.rint((samples / white).clip(0, 1) * 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return to_srgb(image)
    rgba = image.convert("RGBA")
    return Image.composite(to_srgb(rgba), Image.new("RGB", image.size, "white"), rgba.getchannel("A"))


def to_srgb(image: Image.Image) -> Image.Image:
    """`image` as RGB: by its colour profile where it has one other than sRGB that can be read."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info.get("icc_profile")))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[profile.profile.xcolor_space.strip()]
        if "sRGB" not in ImageCms.getProfileDescription(profile):
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image.convert(mode), profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, KeyError, TypeError):  # there is none, or a broken one
        pass
    return image.convert("RGB")


def open_mask(path: str | Path) -> Image.Image:
    """The mask at `path` as an upright image of mode "L": 255 under its brightest paint, less under darker or half
    transparent paint, and 0 only where it is black or transparent. A JPEG's black is noisy, so there any paint brighter
    than 127 counts as full, and no other. Warns where nothing or everything is inside."""
    image = open_upright(path)
    if image.mode[0] in "IF":
        paint = np.nan_to_num(np.asarray(image, np.float64)).clip(0)
    else:
        pixels = np.asarray(image.convert("RGBA"), np.float64) / 255
        paint = pixels[..., :3].max(-1) * pixels[..., 3]
    if image.format == "JPEG":
        paint = paint > 0.5
    inside = paint > 0
    if inside.all() or not inside.any():
        extent = "full: every" if inside.any() else "empty: no"
        warnings.warn(f"the mask {path} is {extent} pixel is painted", stacklevel=2)
    return Image.fromarray(np.ceil(paint * (255 / (paint.max() or 1))).clip(0, 255).astype(np.uint8))


def bucket(width: int, height: int, size: int, multiple: int) -> tuple[int, int]:
    """The (width, height) in multiples of `multiple`, of an area of about size^2, nearest to the shape
    width : height. Where a side would vanish, it is one multiple."""
    most = size / multiple
    root = min(max(math.sqrt(width / height), 1 / most), most)
    sides = [(math.floor(side), math.ceil(side)) for side in (most * root, most / root)]
    shapes = [(wide, high) for wide, high in product(*sides) if wide and high]
    wide, high = min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1] / root**2)))
    return wide * multiple, high * multiple


def fit_picture(image: Image.Image, size: int, fit: str = "crop", multiple: int = 1) -> Image.Image:
    """`image` as a model takes it, whose sides must be multiples of `multiple`. At size x size: the centre square
    ("crop"), all of it between white bars ("pad"), or squeezed ("stretch"). With "keep" all of it in about its own
    shape and size^2 pixels, its sides by `bucket`. A picture that has the size already keeps every pixel."""
    if fit == "keep":
        return image.resize(bucket(*image.size, size, multiple), Image.Resampling.LANCZOS)
    if fit == "pad" and 2 * size * min(image.size) <= max(image.size):
        raise InputError(f"fit=pad would leave no pixel of a picture of {image.width}x{image.height}: choose another")
    return FITS[fit](image, (size, size), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image -> (1, 3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return rearrange(pixels, "h w c -> 1 c h w").float() / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) or (1, 3, H, W) in [-1, 1] -> an 8-bit RGB image; values beyond the range are clamped."""
    image = image.detach().float().cpu().reshape(image.shape[-3:])
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").contiguous().numpy())
