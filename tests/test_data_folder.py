"""A user's own folder of pictures: which captions are read, in which order, and which folders are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.folder import Folder
from errors import InputError

FAULTS = Path(__file__).parent / "fixtures" / "faults"


def paint(path, color, caption=None, suffix=".txt"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), color).save(path)
    if caption is not None:
        path.with_suffix(suffix).write_bytes(caption.encode())


@pytest.fixture
def photos(tmp_path):
    """Ten pictures, each of the grey level in its caption."""
    for i in range(10):
        paint(tmp_path / "inner" / f"{i}.png", (i * 20,) * 3)
    lines = [json.dumps({"file_name": f"inner/{i}.png", "text": f"grey {i * 20}"}) for i in range(10)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def test_each_item_has_its_own_caption_and_each_epoch_every_picture(photos):
    data = Folder(photos, size=16)
    items = [data[i] for i in range(30)]
    for item in items:
        assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.uint8
        assert item["caption"] == f"grey {int(item['image'].float().mean())}"
        assert item["concept"] == f"inner/{int(item['caption'].split()[1]) // 20}.png"
    order = [item["concept"] for item in items]
    epochs = order[:10], order[10:20], order[20:]
    assert all(len(set(epoch)) == 10 for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    again = [[Folder(photos, seed=seed)[i]["concept"] for i in range(30)] for seed in (0, 1)]
    assert again[0] == order != again[1] and Folder(photos)[10**9 - 1]


def test_held_out_pictures_are_the_same_for_every_seed(photos):
    splits = [
        {Folder(photos, split, seed=seed, held_out=0.2)[i]["concept"] for i in range(40)}
        for split, seed in (("train", 0), ("train", 1), ("heldout", 0), ("heldout", 1))
    ]
    assert splits[0] == splits[1] and splits[2] == splits[3]
    assert not splits[0] & splits[2] and len(splits[0]) == 8 and len(splits[2]) == 2
    assert len(Folder(photos, "heldout", held_out=0.001).names) == 1 and len(Folder(photos, "heldout").names) == 10


def test_captions_lie_beside_pictures_also_in_folders_within(tmp_path):
    paint(tmp_path / "dog.jpg", "red", "a dog\n")
    paint(tmp_path / "a" / "b" / "cat.PNG", "blue", "\ufeffa cat", ".caption")
    paint(tmp_path / ".hidden" / "x.png", "blue", "hidden")
    (tmp_path / "notes.txt").write_text("not a caption")
    data = Folder(tmp_path)
    assert data.captions == {"dog.jpg": "a dog", "a/b/cat.PNG": "a cat"} and data.vocabulary() == ["a cat", "a dog"]


def test_silent_pictures_and_further_captions_are_counted_in_one_line(tmp_path):
    paint(tmp_path / "in" / "a.png", "red", "second")
    paint(tmp_path / "b.png", "red", "b")
    paint(tmp_path / "silent.png", "red")
    (tmp_path / "in" / "metadata.csv").write_text('file_name,text\na.png,"first,\nof two lines"\n')
    with pytest.warns(UserWarning, match="1 pictures without.* 1 further") as warned:
        assert Folder(tmp_path).captions == {"in/a.png": "first,\nof two lines", "b.png": "b"}
    assert len(warned) == 1


def test_a_line_of_json_ends_at_its_newline_alone(tmp_path):
    shutil.copy(FAULTS / "metadata_u2028.jsonl", tmp_path / "metadata.jsonl")
    for name in ("p0.png", "p1.png"):
        paint(tmp_path / name, "red")
    texts = Folder(tmp_path).vocabulary()
    assert len(texts) == 2 and any("\u2028" in text for text in texts)


def test_pixels_survive(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("noise")
    assert np.array_equal(Folder(tmp_path, size=24)[0]["image"].numpy().transpose(1, 2, 0), pixels)


@pytest.mark.parametrize(
    "metadata, wanted",
    [
        ('{"file_name": "a.png", "text": "x"}\n\n{"file_name": ', r"metadata\.jsonl, line 3"),
        ('{"file_name": "a.png", "caption": "x"}', "line 1"),
        ("[1, 2]", "line 1"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": "y"}', r"line 2.*b\.png"),
        ("", r"metadata\.jsonl"),
    ],
)
def test_broken_metadata_is_named_by_its_line(tmp_path, metadata, wanted):
    paint(tmp_path / "a.png", "red")
    (tmp_path / "metadata.jsonl").write_text(metadata)
    with pytest.raises(InputError, match=wanted) as error:
        Folder(tmp_path)
    assert "\n" not in str(error.value)


def test_unfit_folders_and_settings_are_refused(tmp_path):
    for path, wanted in ((tmp_path / "nowhere", "nowhere"), (None, "data.path"), (tmp_path, "caption")):
        with pytest.raises(InputError, match=wanted):
            Folder(path)
    paint(tmp_path / "a.png", "red", "a picture")
    for bad in ({"split": "test"}, {"fit": "bend"}, {"held_out": 1.0}, {"held_out": 0.5, "split": "heldout"}):
        with pytest.raises(InputError):
            Folder(tmp_path, **bad)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"a\.png"):
        Folder(tmp_path)[0]
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00d")
    with pytest.raises(InputError, match="UTF-8"):
        Folder(tmp_path)
