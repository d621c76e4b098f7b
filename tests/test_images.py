"""Pictures of every kind come in upright, in sRGB, in range and at the right size; broken ones in one line."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from data.images import FITS, TURNS, bucket, fit_picture, open_mask, open_rgb, to_pil, to_tensor
from errors import InputError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
FAULTS = Path(__file__).parent / "fixtures" / "faults"


def quadrants(size=32):
    """Red top left, green top right, blue bottom left, white bottom right: every turn and mirror differs."""
    pixels = np.full((size, size, 3), 255, dtype=np.uint8)
    half = size // 2
    pixels[:half, :half], pixels[:half, half:], pixels[half:, :half] = RED, GREEN, BLUE
    return Image.fromarray(pixels)


def corners(image):
    w, h = image.size
    return [image.getpixel(xy) for xy in ((1, 1), (w - 2, 1), (1, h - 2), (w - 2, h - 2))]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    turn = TURNS.get({6: 8, 8: 6}.get(orientation, orientation))  # that of the camera: the others undo themselves
    exif = Image.Exif()
    exif[0x0112] = orientation
    (quadrants() if turn is None else quadrants().transpose(turn)).save(tmp_path / "photo.png", exif=exif)
    assert corners(open_rgb(tmp_path / "photo.png")) == corners(quadrants())


def test_malformed_entries_and_long_texts_are_no_fault():
    for name in ("exif_typeerror.jpg", "exif_refused.jpg"):
        assert Image.open(FAULTS / name).size == (8, 4) and open_rgb(FAULTS / name).size == (4, 8)
    assert open_rgb(FAULTS / "png_text_over_1mb.png").size == (60, 40)


def test_colour_profiles_are_converted_to_srgb(tmp_path):
    wide = Image.open(FAULTS / "display_p3.png")
    red = np.argwhere((np.array(wide) == (235, 64, 52)).all(-1))[0][::-1].tolist()
    assert open_rgb(FAULTS / "display_p3.png").getpixel(tuple(red)) == (255, 32, 30)
    for profile in (b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        wide.save(tmp_path / "same.png", icc_profile=profile)
        assert np.array_equal(np.array(open_rgb(tmp_path / "same.png")), np.array(wide))


def test_transparency_is_laid_over_white(tmp_path):
    rgba = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    rgba.putpixel((3, 3), (255, 0, 0, 128))
    rgba.save(tmp_path / "rgba.png")
    seen = open_rgb(tmp_path / "rgba.png")
    assert seen.getpixel((0, 0)) == WHITE and seen.getpixel((3, 3)) == pytest.approx((255, 127, 127), abs=1)
    palette = quadrants().quantize(4)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    assert corners(open_rgb(tmp_path / "p.png")) == [WHITE, GREEN, BLUE, WHITE]  # red is see-through


def test_deep_and_float_samples_are_scaled_not_clipped(tmp_path):
    for white, dtype, suffix in ((65535, "u2", "png"), (65535, "u2", "tiff"), (1, "f4", "tiff"), (255, "f4", "tiff")):
        samples = np.array([[0, 1 / 255, 128 / 255, 1]]) * white
        Image.fromarray(samples.astype(dtype)).save(tmp_path / f"deep.{suffix}")
        assert np.array(open_rgb(tmp_path / f"deep.{suffix}"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_broken_files_are_one_clear_line(tmp_path, monkeypatch):
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(whole, "PNG")
    data = whole.getvalue()
    flipped = bytearray(data)
    flipped[-14] ^= 4  # in the checksum of the pixels
    files = {"truncated.png": data[: len(data) // 2], "flipped.png": bytes(flipped), "text.png": b"no", "big.png": data}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in (*files, "missing.png"):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000 if name == "big.png" else 10**6)
        with pytest.raises(InputError, match=name) as error:
            open_rgb(tmp_path / name)
        assert "\n" not in str(error.value)


def test_any_opaque_paint_is_inside_a_mask(tmp_path):
    square = np.zeros((64, 64), np.uint8)
    square[16:48, 16:48] = 1
    Image.fromarray(square * 255).save(tmp_path / "noisy.jpg", quality=60)
    Image.fromarray(square.astype(np.uint16)).save(tmp_path / "deep.png")
    names = ("mask_zero_one.png", "mask_green_rgb.png", "mask_rgba_white_on_transparent.png")
    for path in (*(FAULTS / name for name in names), tmp_path / "noisy.jpg", tmp_path / "deep.png"):
        assert np.array_equal(np.array(open_mask(path)), square * 255), path
    for level, word in ((0, "empty"), (255, "full")):
        Image.new("L", (8, 8), level).save(tmp_path / "mask.png")
        with pytest.warns(UserWarning, match=word):
            open_mask(tmp_path / "mask.png")


def test_crop_keeps_the_centre_and_the_others_the_whole():
    wide = Image.new("RGB", (96, 32), WHITE)
    wide.paste(Image.new("RGB", (32, 32), GREEN), (32, 0))
    wide.paste(Image.new("RGB", (32, 32), RED), (0, 0))
    assert set(corners(fit_picture(wide, 32, "crop"))) == {GREEN}
    assert [fit_picture(wide, 30, "stretch").getpixel((x, 15)) for x in (2, 15, 27)] == [RED, GREEN, WHITE]
    padded = [fit_picture(wide, 48, "pad").getpixel((x, y)) for x, y in ((8, 15), (8, 17), (24, 30), (24, 32))]
    assert padded == [WHITE, RED, GREEN, WHITE]
    with pytest.raises(InputError, match="pad"):  # nothing of it would be left
        fit_picture(wide.resize((96, 1)), 32, "pad")
    kept = fit_picture(quadrants(32).resize((48, 32), Image.Resampling.NEAREST), 64, "keep", multiple=16)
    assert kept.size == (80, 48) and corners(kept) == [RED, GREEN, BLUE, WHITE]


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 12), st.sampled_from([1, 16, 64]))
@settings(max_examples=100, deadline=None)
def test_a_bucket_has_the_shape_the_area_and_sides_of_multiples(width, height, size, multiple):
    size *= multiple
    sides = bucket(width, height, size, multiple)
    assert all(side >= multiple and side % multiple == 0 for side in sides)
    if 1 / 4 < width / height < 4 and size >= 4 * multiple:
        assert 2 / 3 < sides[0] / sides[1] * height / width < 1.5 and 0.5 < sides[0] * sides[1] / size**2 < 2


@pytest.mark.parametrize("fit", [*FITS, "keep"])
def test_eight_bits_survive_the_round_trip_and_values_beyond_are_clamped(tmp_path, fit):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    to_pil(to_tensor(Image.fromarray(pixels))).save(tmp_path / "x.png")
    assert np.array_equal(np.array(to_pil(to_tensor(fit_picture(open_rgb(tmp_path / "x.png"), 16, fit)))), pixels)
    assert np.array(to_pil(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1)))[0, 0].tolist() == [0, 128, 255]
