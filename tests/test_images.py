"""Pictures of every kind come in upright, in sRGB, in range and at the right size; broken ones in one line."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from data.images import TURNS, bucket, find, fit_picture, open_mask, open_rgb, read_image, to_pil, to_tensor
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


# Files as they come.


def test_exif_orientation_is_undone(tmp_path):
    undo = {5: 5, 6: 8, 8: 6, 7: 7}  # the turn that a camera applied to the upright picture
    for orientation in range(1, 9):
        turn = TURNS.get(undo.get(orientation, orientation))
        exif = Image.Exif()
        exif[0x0112] = orientation
        (quadrants() if turn is None else quadrants().transpose(turn)).save(tmp_path / "photo.png", exif=exif)
        assert corners(open_rgb(tmp_path / "photo.png")) == corners(quadrants()), orientation


@pytest.mark.parametrize("name", ["exif_typeerror.jpg", "exif_refused.jpg"])
def test_a_malformed_entry_of_exif_leaves_the_orientation(name):
    assert Image.open(FAULTS / name).size == (8, 4) and open_rgb(FAULTS / name).size == (4, 8)


def test_long_texts_and_profiles_of_a_png_are_no_fault(tmp_path):
    assert open_rgb(FAULTS / "png_text_over_1mb.png").size == (60, 40)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(2**21)
    quadrants().save(tmp_path / "x.png", icc_profile=profile)
    assert corners(open_rgb(tmp_path / "x.png")) == corners(quadrants())


def test_colour_profiles_are_converted_to_srgb(tmp_path):
    wide = Image.open(FAULTS / "display_p3.png")
    red = np.argwhere((np.array(wide) == (235, 64, 52)).all(-1))[0][::-1].tolist()
    assert open_rgb(FAULTS / "display_p3.png").getpixel(tuple(red)) == (255, 32, 30)
    clear = wide.convert("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png", icc_profile=wide.info["icc_profile"])
    assert open_rgb(tmp_path / "clear.png").getpixel((0, 0)) == WHITE
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
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))  # red becomes see-through
    assert corners(open_rgb(tmp_path / "p.png")) == [WHITE, GREEN, BLUE, WHITE]


def test_deep_and_float_samples_are_scaled_not_clipped(tmp_path):
    for suffix in ("png", "tiff"):
        Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)).save(tmp_path / f"deep.{suffix}")
        assert np.array(open_rgb(tmp_path / f"deep.{suffix}"))[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)).save(tmp_path / "f.tiff")
    assert np.array(open_rgb(tmp_path / "f.tiff"))[0, :, 0].tolist() == [0, 128, 255, 0]


@pytest.mark.parametrize("kind", ["CMYK tiff", "CMYK jpg", "L png", "1 png", "P gif"])
def test_other_modes_and_the_first_frame_keep_black_and_white(tmp_path, kind):
    mode, suffix = kind.split()
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:, 8:] = 255
    more = {"save_all": True, "append_images": [Image.new("P", (16, 16))]} if suffix == "gif" else {}
    Image.fromarray(pixels).convert("RGB").convert(mode).save(tmp_path / f"x.{suffix}", **more)
    seen = np.array(open_rgb(tmp_path / f"x.{suffix}")).astype(int)
    assert seen.shape == (16, 16, 3) and seen[:, :7].max() <= 6 and seen[:, 9:].min() >= 249


def test_broken_files_are_one_clear_line(tmp_path):
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(whole, "PNG")
    data = whole.getvalue()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    Image.effect_noise((64, 64), 80).save(tmp_path / "photo.jpg")
    files = {"truncated.png": data[: len(data) // 2], "flipped.png": bytes(flipped), "empty.png": b""}
    files |= {"text.png": b"no", "cut.jpg": (tmp_path / "photo.jpg").read_bytes()[:300]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in (*files, "missing.png"):
        with pytest.raises(InputError, match=name) as error:
            read_image(tmp_path / name, 16)
        assert "\n" not in str(error.value)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("1", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb\.png"):
        open_rgb(tmp_path / "bomb.png")


def test_bundled_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("pyproject.toml").is_file()
    (tmp_path / "pyproject.toml").write_text("mine")
    assert find("pyproject.toml").read_text() == "mine"


# Masks.


def test_any_opaque_paint_is_inside_a_mask(tmp_path):
    square = np.zeros((64, 64), np.uint8)
    square[16:48, 16:48] = 1
    palette = Image.fromarray(square).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(square * 255).save(tmp_path / "noisy.jpg", quality=60)
    Image.fromarray(square.astype(np.uint16)).save(tmp_path / "deep.png")
    names = ("mask_zero_one.png", "mask_green_rgb.png", "mask_rgba_white_on_transparent.png")
    for path in (*(FAULTS / name for name in names), *(tmp_path / n for n in ("palette.png", "noisy.jpg", "deep.png"))):
        assert np.array_equal(np.array(open_mask(path)), square * 255), path


@pytest.mark.parametrize("level, word", [(0, "empty"), (255, "full")])
def test_an_empty_or_full_mask_is_said(tmp_path, level, word):
    Image.new("L", (8, 8), level).save(tmp_path / "mask.png")
    with pytest.warns(UserWarning, match=word) as warned:
        open_mask(tmp_path / "mask.png")
    assert len(warned) == 1


# Sizes.


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["crop", "pad", "stretch"]))
@settings(max_examples=60, deadline=None)
def test_every_shape_becomes_the_square(width, height, fit):
    image = to_tensor(fit_picture(Image.new("RGB", (width, height), RED), 24, fit))
    assert image.shape == (1, 3, 24, 24) and image.dtype == torch.float32
    covered = (image - torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)).abs().amax(1) < 0.02
    longest = max(width, height)
    shown = max(1, round(width * 24 / longest)) * max(1, round(height * 24 / longest)) if fit == "pad" else 24 * 24
    assert covered.sum() == shown and (image.amin(1)[~covered] == 1).all()  # the bars are white


def test_crop_keeps_the_centre_and_stretch_and_keep_the_whole():
    wide = Image.new("RGB", (96, 32), WHITE)
    wide.paste(Image.new("RGB", (32, 32), GREEN), (32, 0))
    wide.paste(Image.new("RGB", (32, 32), RED), (0, 0))
    assert set(corners(fit_picture(wide, 32, "crop"))) == {GREEN}
    assert [fit_picture(wide, 30, "stretch").getpixel((x, 15)) for x in (2, 15, 27)] == [RED, GREEN, WHITE]
    kept = fit_picture(quadrants(32).resize((48, 32), Image.Resampling.NEAREST), 64, "keep", multiple=16)
    assert kept.size == (80, 48) and corners(kept) == [RED, GREEN, BLUE, WHITE]
    for wrong in ((72, "keep"), (0, "crop"), (-16, "crop"), ("big", "crop"), (64, "squash")):
        with pytest.raises(InputError):
            fit_picture(wide, *wrong, multiple=16)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 12), st.sampled_from([1, 16, 64]))
@settings(max_examples=200, deadline=None)
def test_a_bucket_has_the_shape_the_area_and_sides_of_multiples(width, height, size, multiple):
    size *= multiple
    sides = bucket(width, height, size, multiple)
    assert all(side >= multiple and side % multiple == 0 for side in sides)
    assert bucket(height, width, size, multiple) == sides[::-1] and bucket(4032, 3024, 512, 64) == (576, 448)
    ideal = [size * (width / height) ** 0.5, size * (height / width) ** 0.5]
    if min(ideal) >= multiple:  # otherwise thinner than can be kept
        assert all(abs(side - wanted) < multiple for side, wanted in zip(sides, ideal, strict=True))
        nearest = [max(multiple, round(side / multiple) * multiple) for side in ideal]
        strain = [abs(np.log(w / h * height / width)) for w, h in (sides, nearest)]
        assert strain[0] <= strain[1] + 1e-9  # no worse than rounding each side by itself


def test_eight_bits_survive_the_round_trip_and_values_beyond_are_clamped(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    to_pil(to_tensor(Image.fromarray(pixels))).save(tmp_path / "x.png")
    for fit in ("crop", "pad", "stretch", "keep"):
        assert np.array_equal(np.array(to_pil(read_image(tmp_path / "x.png", 16, fit))), pixels)
    assert np.array(to_pil(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1)))[0, 0].tolist() == [0, 128, 255]
