"""A user's own folder of pictures: which captions are read, in which order, and which folders are refused."""

import json

import pytest
from PIL import Image

from data.folder import Folder
from errors import InputError


def paint(path, level, caption=None, suffix=".txt"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (40, 30), level).save(path)
    if caption is not None:
        path.with_suffix(suffix).write_bytes(caption.encode())


@pytest.fixture
def photos(tmp_path):
    """Ten pictures, each of the grey level in its caption."""
    for i in range(10):
        paint(tmp_path / "inner" / f"{i}.png", i * 20)
    lines = [json.dumps({"file_name": f"inner/{i}.png", "text": f"grey {i * 20}"}) for i in range(10)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def captions(data, count=30):
    return [data[i]["caption"] for i in range(count)]


def test_each_item_has_its_own_caption_and_each_epoch_every_picture(photos):
    data = Folder(photos, size=16)
    for i in range(10):
        assert data[i]["image"].shape == (3, 16, 16)
        assert (data[i]["image"] == int(data[i]["caption"].removeprefix("grey "))).all()
    order = captions(data)
    epochs = order[:10], order[10:20], order[20:]
    assert all(len(set(epoch)) == 10 for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert captions(Folder(photos, seed=0)) == order != captions(Folder(photos, seed=1)) and data[10**9]


def test_held_out_pictures_are_the_same_for_every_seed(photos):
    train, heldout = ([Folder(photos, s, seed=i, held_out=0.2) for i in (0, 1)] for s in ("train", "heldout"))
    shown = [set(captions(data)) for data in (*train, *heldout)]
    assert shown[0] == shown[1] and shown[2] == shown[3] and not shown[0] & shown[2]
    assert [len(s) for s in shown] == [8, 8, 2, 2] and len(Folder(photos, "heldout", held_out=0.001).names) == 1
    assert len(Folder(photos, "heldout").names) == 10


def test_captions_lie_beside_pictures_and_metadata_comes_first(tmp_path):
    paint(tmp_path / "dog.jpg", 9, "a dog\n")
    paint(tmp_path / "a" / "b" / "cat.PNG", 9, "\ufeffa cat", ".caption")
    paint(tmp_path / "in" / "a.png", 9, "second")
    paint(tmp_path / ".hidden" / "x.png", 9, "hidden")
    paint(tmp_path / "silent.png", 9)
    (tmp_path / "notes.txt").write_text("not a caption")
    (tmp_path / "in" / "metadata.csv").write_text('file_name,text\na.png,"first,\nof two lines"\n')
    with pytest.warns(UserWarning, match="1 pictures without"):
        data = Folder(tmp_path)
    assert data.captions == {"dog.jpg": "a dog", "a/b/cat.PNG": "a cat", "in/a.png": "first,\nof two lines"}
    assert data.vocabulary() == ["a cat", "a dog", "first,\nof two lines"]


def test_unfit_folders_and_settings_are_refused(tmp_path):
    paint(tmp_path / "a.png", 9, "a picture")
    wrong = {"path": tmp_path / "nowhere"}, {"fit": "bend"}, {"held_out": "x"}, {"held_out": 0.5, "split": "heldout"}
    for setting in wrong:
        with pytest.raises(InputError, match=rf"data\.({'|'.join(setting)})"):
            Folder(**{"path": tmp_path} | setting)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"a\.png"):
        Folder(tmp_path)[0]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": "y"}')
    with pytest.raises(InputError, match="line 2"):
        Folder(tmp_path)
