"""A user's own folder of pictures: what is read, in which order, and what is said of a folder that will not do."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data.folder import Folder
from errors import InputError


def paint(path, color, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def photos(tmp_path):
    """Ten pictures, each of one grey level that its caption tells."""
    lines = []
    for i in range(10):
        paint(tmp_path / "inner" / f"{i}.png", (i * 20,) * 3)
        lines.append(json.dumps({"file_name": f"inner/{i}.png", "text": f"grey {i * 20}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def test_each_item_has_its_own_caption_and_each_epoch_every_picture(photos):
    data = Folder(photos, size=16)
    epochs = []
    for epoch in range(3):
        items = [data[epoch * 10 + i] for i in range(10)]
        for item in items:
            assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.uint8
            assert item["caption"] == f"grey {int(item['image'].float().mean())}"
            assert item["caption"].split()[1] == str(int(item["concept"].split("/")[1][0]) * 20)
        assert len({item["concept"] for item in items}) == 10
        epochs.append([item["concept"] for item in items])
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_alone(photos):
    order = [[Folder(photos, seed=seed)[i]["concept"] for i in range(25)] for seed in (0, 0, 1)]
    assert order[0] == order[1] != order[2]
    assert len(Folder(photos)) >= 10**9 and Folder(photos)[10**9 - 1]


def test_held_out_pictures_are_the_same_whatever_the_seed(photos):
    splits = [
        {Folder(photos, split, seed=seed, held_out=0.2)[i]["concept"] for i in range(40)}
        for split, seed in (("train", 0), ("train", 1), ("heldout", 0), ("heldout", 1))
    ]
    assert splits[0] == splits[1] and splits[2] == splits[3]
    assert not splits[0] & splits[2] and len(splits[0]) == 8 and len(splits[2]) == 2
    assert len({Folder(photos, "heldout", held_out=0.001)[i]["concept"] for i in range(9)}) == 1
    assert len(Folder(photos, "heldout").names) == 10


def test_text_files_beside_the_pictures(tmp_path):
    paint(tmp_path / "dog.jpg", "red")
    (tmp_path / "dog.txt").write_text("a dog\n")
    paint(tmp_path / "cat.PNG", "blue")
    (tmp_path / "cat.txt").write_bytes("\ufeffa cat".encode())
    paint(tmp_path / "silent.png", "green")
    (tmp_path / "notes.txt").write_text("not a caption")
    data = Folder(tmp_path)
    assert {data[i]["caption"] for i in range(4)} == {"a cat", "a dog"}
    assert data.vocabulary() == ["a cat", "a dog"]


def test_pixels_survive(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("noise")
    assert np.array_equal(Folder(tmp_path, size=24)[0]["image"].numpy().transpose(1, 2, 0), pixels)


@pytest.mark.parametrize(
    "metadata, wanted",
    [
        ('{"file_name": "a.png", "text": "x"}\n\n{"file_name": ', r"metadata\.jsonl, line 3 is not JSON"),
        ('{"file_name": "a.png", "caption": "x"}', r'line 1: wanted .*"text"'),
        ('{"file_name": "a.png", "text": 3}', r'line 1: wanted .*"text"'),
        ("[1, 2]", r'line 1: wanted .*"file_name"'),
        (
            '{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": "y"}',
            r"line 2: there is no picture .*b\.png",
        ),
        ("", r"no captioned picture.*metadata\.jsonl.*\.txt"),
    ],
)
def test_broken_metadata_is_told_by_its_line(tmp_path, metadata, wanted):
    paint(tmp_path / "a.png", "red")
    (tmp_path / "metadata.jsonl").write_text(metadata)
    with pytest.raises(InputError, match=wanted) as error:
        Folder(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_that_will_not_do(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Folder(tmp_path / "nowhere")
    paint(tmp_path / "a.png", "red")
    with pytest.raises(InputError, match=r"metadata\.jsonl.*\.txt"):
        Folder(tmp_path)
    with pytest.raises(InputError, match=r"data\.path is missing"):
        Folder(None)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00d")
    with pytest.raises(InputError, match="not UTF-8"):
        Folder(tmp_path)
    (tmp_path / "a.txt").write_text("a picture")
    for bad in ({"split": "test"}, {"fit": "bend"}, {"held_out": 1.0}, {"held_out": 0.5, "split": "heldout"}):
        with pytest.raises(InputError):
            Folder(tmp_path, **bad)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"a\.png"):
        Folder(tmp_path)[0]
