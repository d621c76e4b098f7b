"""Pictures of every kind come in upright, in the right range, at the right size; broken ones in one line."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.images import bucket, find, fit_picture, fit_square, open_rgb, read_image, to_pil, to_tensor
from data.tasks import OneImage
from errors import InputError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(size=32):
    """Red top left, green top right, blue bottom left, white bottom right: every turn and mirror differs."""
    pixels = np.full((size, size, 3), 255, dtype=np.uint8)
    half = size // 2
    pixels[:half, :half], pixels[:half, half:], pixels[half:, :half] = RED, GREEN, BLUE
    return Image.fromarray(pixels)


def corners(image):
    w, h = image.size
    return [image.getpixel(xy) for xy in ((1, 1), (w - 2, 1), (1, h - 2), (w - 2, h - 2))]


# The eight EXIF orientations, and the transform that a camera would have applied to the upright picture.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone(tmp_path, orientation):
    upright = quadrants()
    stored = upright if STORED[orientation] is None else upright.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert corners(open_rgb(tmp_path / "photo.png")) == corners(upright)


def test_transparency_is_laid_over_white(tmp_path):
    rgba = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    rgba.putpixel((3, 3), (255, 0, 0, 128))
    rgba.save(tmp_path / "rgba.png")
    seen = open_rgb(tmp_path / "rgba.png")
    assert seen.getpixel((0, 0)) == WHITE
    assert seen.getpixel((3, 3)) == pytest.approx((255, 127, 127), abs=1)

    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "la.png")
    assert open_rgb(tmp_path / "la.png").getpixel((0, 0)) == WHITE

    palette = quadrants().quantize(4)
    clear = palette.getpixel((0, 0))  # the palette's entry for red becomes see-through
    palette.save(tmp_path / "p.png", transparency=clear)
    assert corners(open_rgb(tmp_path / "p.png")) == [WHITE, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    samples = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(samples).save(tmp_path / f"deep.{suffix}")
    assert np.array(open_rgb(tmp_path / f"deep.{suffix}"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_samples_are_scaled(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)).save(tmp_path / "f.tiff")
    assert np.array(open_rgb(tmp_path / "f.tiff"))[0, :, 0].tolist() == [0, 128, 255, 0]


@pytest.mark.parametrize("kind", ["CMYK tiff", "CMYK jpg", "L png", "1 png", "P gif"])
def test_other_modes_keep_black_and_white(tmp_path, kind):
    """Black left, white right survives every mode."""
    mode, suffix = kind.split()
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:, 8:] = 255
    source = Image.fromarray(pixels).convert("RGB").convert(mode)
    source.save(tmp_path / f"x.{suffix}")
    seen = np.array(open_rgb(tmp_path / f"x.{suffix}")).astype(int)
    assert seen.shape == (16, 16, 3)
    assert seen[:, :7].max() <= 6 and seen[:, 9:].min() >= 249


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_give_their_first_frame(tmp_path, suffix):
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second], duration=100, lossless=True)
    assert open_rgb(tmp_path / f"a.{suffix}").getpixel((4, 4)) == pytest.approx(RED, abs=2)


@given(width=st.integers(1, 90), height=st.integers(1, 90), fit=st.sampled_from(["crop", "pad", "stretch"]))
@settings(max_examples=60, deadline=None)
def test_every_shape_becomes_the_square(width, height, fit):
    image = to_tensor(fit_square(Image.new("RGB", (width, height), RED), 24, fit))
    assert image.shape == (1, 3, 24, 24) and image.dtype == torch.float32
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)
    covered = (image - red).abs().amax(1) < 0.02
    if fit == "pad":
        longest = max(width, height)
        shown = max(1, round(width * 24 / longest)) * max(1, round(height * 24 / longest))
        assert covered.sum() == shown
        assert (image.amin(1)[~covered] == 1).all()  # the bars are white
    else:
        assert covered.all()


def test_crop_keeps_the_centre_and_stretch_the_whole():
    wide = Image.new("RGB", (96, 32), WHITE)
    wide.paste(Image.new("RGB", (32, 32), GREEN), (32, 0))
    wide.paste(Image.new("RGB", (32, 32), RED), (0, 0))
    assert set(corners(fit_square(wide, 32, "crop"))) == {GREEN}
    stretched = fit_square(wide, 30, "stretch")
    assert [stretched.getpixel((x, 15)) for x in (2, 15, 27)] == [RED, GREEN, WHITE]


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    size=st.integers(1, 12),
    multiple=st.sampled_from([1, 16, 64]),
)
@settings(max_examples=200, deadline=None)
def test_a_bucket_has_the_shape_the_area_and_sides_of_multiples(width, height, size, multiple):
    size *= multiple
    sides = bucket(width, height, size, multiple)
    assert all(side >= multiple and side % multiple == 0 for side in sides)
    assert bucket(height, width, size, multiple) == sides[::-1]
    if not multiple <= size * (width / height) ** 0.5 <= size**2 / multiple:
        return  # thinner than can be kept
    ideal = [size * (width / height) ** 0.5, size * (height / width) ** 0.5]
    assert all(abs(side - wanted) < multiple for side, wanted in zip(sides, ideal, strict=True))
    nearest = [max(multiple, round(side / multiple) * multiple) for side in ideal]
    strain = [abs(np.log(w / h * height / width)) for w, h in (sides, nearest)]
    assert strain[0] <= strain[1] + 1e-9  # no worse than rounding each side by itself


def test_keep_shows_the_whole_picture_in_its_own_shape():
    assert bucket(4032, 3024, 512, 64) == (576, 448)  # a phone's
    assert bucket(3000, 2000, 512, 64) == (576, 384)
    assert bucket(1000, 1000, 512, 64) == (512, 512)
    assert bucket(50000, 1, 512, 64) == (4096, 64)
    kept = fit_picture(quadrants(32).resize((48, 32), Image.Resampling.NEAREST), 64, "keep", multiple=16)
    assert kept.size == (80, 48) and corners(kept) == [RED, GREEN, BLUE, WHITE]
    same = Image.effect_noise((96, 64), 60).convert("RGB").resize((96, 64))
    exact = fit_picture(same.resize((96, 96)), 96, "keep", multiple=32)
    assert exact.tobytes() == same.resize((96, 96)).tobytes()  # what has the size keeps every pixel
    with pytest.raises(InputError, match="size=72: the side in pixels must be a multiple of 16"):
        fit_picture(same, 72, "keep", multiple=16)
    for size in (0, -16, "big", 64.0):
        with pytest.raises(InputError, match="multiple of 16"):
            fit_picture(same, size, "crop", multiple=16)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_eight_bit_round_trip_is_exact(tmp_path_factory, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("round") / "x.png"
    to_pil(to_tensor(Image.fromarray(pixels))).save(path)
    for fit in ("crop", "pad", "stretch"):
        assert np.array_equal(np.array(to_pil(read_image(path, 16, fit))), pixels)


def test_values_out_of_range_are_clamped():
    assert np.array(to_pil(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1)))[0, 0].tolist() == [0, 128, 255]


def broken_files(folder):
    whole = folder / "whole.png"
    Image.effect_noise((64, 64), 80).save(whole)
    data = whole.read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "garbled.png").write_bytes(data[:60] + b"\xff" * 40 + data[100:])
    Image.effect_noise((64, 64), 80).save(folder / "photo.jpg")
    (folder / "cut.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:300])
    (folder / "folder.png").mkdir()
    return ["truncated.png", "empty.png", "text.png", "garbled.png", "cut.jpg", "folder.png", "missing.png"]


def test_broken_files_are_one_clear_line(tmp_path):
    for name in broken_files(tmp_path):
        with pytest.raises(InputError) as error:
            read_image(tmp_path / name, 16)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("1", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="million pixels"):
        open_rgb(tmp_path / "bomb.png")


def test_bundled_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("pyproject.toml").is_file()
    (tmp_path / "pyproject.toml").write_text("mine")
    assert find("pyproject.toml").read_text() == "mine"


def load(source, *size):
    (entry,) = source.share
    return source.load(entry, *size)


def test_one_image_task(tmp_path):
    quadrants().save(tmp_path / "x.png")
    task = load(OneImage(str(tmp_path / "x.png"), "  a cat ", fit="pad"), 16)
    assert (task.prompt, task.source_prompt, task.image.shape) == ("a cat", "", (1, 3, 16, 16))

    example = {"image": str(tmp_path / "x.png"), "prompt": "a dog", "source_prompt": "a cat"}
    task = load(OneImage(None, None, example=example), 16)
    assert (task.prompt, task.source_prompt) == ("a dog", "a cat")
    with pytest.raises(InputError, match="prompt is empty"):  # the example's prompt is for its picture
        OneImage(str(tmp_path / "x.png"), None, example=example)
    with pytest.raises(InputError, match="prompt is empty"):
        OneImage(None, " ", example=example)
    task = load(OneImage(None, None, fit="keep", example=example), 64, 64)
    assert task.image.shape == (1, 3, 64, 64)
    with pytest.raises(InputError, match="fit=squash"):
        OneImage(None, None, fit="squash", example=example)
