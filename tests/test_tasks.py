"""Lists of tasks: which of them are chosen, how processes share them, and what each benchmark's folder holds."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.benchmarks import PIE_TYPES, ListOfEdits, PieBench, TedBench, folder_name
from data.images import to_tensor
from data.tasks import Entry, OneImage, Tasks
from errors import InputError

FAULTS = Path(__file__).parent / "fixtures" / "faults"
ENTRIES = [Entry(f"{i}{kind}", "a cat", category=kind) for i, kind in enumerate("abacbaa")]


def names(entries):
    return " ".join(entry.name for entry in entries)


def test_categories_and_limit_choose():
    assert Tasks(ENTRIES).entries == ENTRIES
    assert names(Tasks(ENTRIES, categories=["c", "a"]).entries) == "0a 2a 3c 5a 6a"
    assert names(Tasks(ENTRIES, categories="b", limit=1).entries) == "1b"
    assert names(Tasks(ENTRIES, limit=2).entries) == "0a 1b 2a 3c 4b"


def test_wrong_choices_are_refused():
    wrong = ("categories", "d"), ("categories", [{}]), ("limit", 0), ("limit", True), ("fit", "squash")
    for name, value in (*wrong, ("shard", "4/4"), ("shard", "-1/4"), ("shard", "1")):
        with pytest.raises(InputError, match=name):
            Tasks(ENTRIES, **{name: value})


@given(st.integers(1, 40), st.integers(1, 9))
def test_shards_share_every_task_once_and_evenly(count, shards):
    entries = [Entry(str(i), "a cat") for i in range(count)]
    shares = [Tasks(entries, shard=f"{i}/{shards}").share for i in range(shards)]
    assert sorted((entry for share in shares for entry in share), key=entries.index) == entries
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_image(tmp_path):
    file = tmp_path / "x.png"
    Image.new("RGB", (8, 4), "red").save(file)
    source = OneImage(str(file), "  a cat ", negative_prompt="blurry", fit="pad")
    task = source.load(*source.share, 16)
    assert (task.name, task.prompt, task.source_prompt, task.negative_prompt) == ("edit", "a cat", "", "blurry")
    assert task.image.shape == (1, 3, 16, 16) and task.image[0, :, 8, 8].tolist() == [1, -1, -1]
    example = {"image": str(file), "prompt": "a dog", "source_prompt": "a cat"}
    source = OneImage(None, None, fit="keep", example=example)
    task = source.load(*source.share, 64, 64)
    assert (task.prompt, task.source_prompt, task.image.shape) == ("a dog", "a cat", (1, 3, 64, 64))
    for image, prompt in ((str(file), None), (None, " ")):  # the example's prompt is for its own picture
        with pytest.raises(InputError, match="prompt="):
            OneImage(image, prompt, example=example)
    with pytest.raises(InputError, match="missing"):
        OneImage(str(tmp_path / "missing.png"), "a cat")


def test_pie_bench(tmp_path):
    folder = tmp_path / "annotation_images" / "6_change_attribute_color_40"
    folder.mkdir(parents=True)
    Image.effect_noise((512, 512), 60).convert("RGB").save(folder / "611.jpg")
    item = {"image_path": f"{folder.name}/611.jpg", "original_prompt": "a [blue] bird", "editing_type_id": "6"}
    item |= {"editing_prompt": "a [red] bird", "mask": [512 * 100, 512 * 100]}  # rows 100 to 199
    (tmp_path / "mapping_file.json").write_text(json.dumps({"611": item}))
    source = PieBench(str(tmp_path))
    (entry,) = source.entries
    assert (entry.name, entry.prompt, entry.source_prompt) == ("611", "a red bird", "a blue bird")
    assert entry.category == "change_color" and len(PIE_TYPES) == 10
    task, small = source.load(entry, 512), source.load(entry, 64, 16)
    assert torch.equal(PieBench(str(tmp_path), fit="keep").load(entry, 64, 16).mask, small.mask)
    assert task.image.shape == (1, 3, 512, 512) and task.mask.shape == (1, 1, 512, 512) and task.truth is None
    assert task.mask[0, 0, 1:-1, 1:-1].sum(1).nonzero().flatten().tolist() == list(range(99, 199))
    assert small.mask[0, 0, 13:24].all() and not small.mask[0, 0, 26:-1, 1:-1].any()  # rows 12.5 to 25 of 64
    for mask in (task.mask[0, 0], small.mask[0, 0]):
        assert set(mask.unique().tolist()) == {0, 1} and mask[[0, -1]].all() and mask[:, [0, -1]].all()


def test_tedbench(tmp_path):
    (tmp_path / "originals").mkdir()
    Image.new("RGB", (60, 40), "red").save(tmp_path / "originals" / "dog_01.jpeg")
    items = [{"img_name": "dog_01.jpeg", "target_text": text} for text in ("A sitting dog.", "A jumping dog.")]
    (tmp_path / "input_list.json").write_text(json.dumps([items[0] | {"target_text": None}]))
    with pytest.raises(InputError, match=r"input_list\.json of TEdBench"):
        TedBench(str(tmp_path))
    (tmp_path / "input_list.json").write_text(json.dumps(items))
    source = TedBench(str(tmp_path), fit="keep")
    assert names(source.entries) == "000_dog_01 001_dog_01"
    task = source.load(source.entries[1], 32, 8)
    assert task.prompt == "A jumping dog." and task.image.shape == (1, 3, 24, 40) and task.mask is task.truth is None


FULL = {
    "image": "dog.png", "prompt": "a “sitting” dog, asleep", "source_prompt": "a dog", "negative_prompt": "blurry",
    "mask": "mask.png", "truth": "true dog.png", "category": "pose", "name": "the dog/1",
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    for i, name in enumerate(("dog", "true dog")):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    Image.open(tmp_path / "dog.png").convert("1").save(tmp_path / "mask.png")
    return tmp_path


def write(path, rows):
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False, encoding="utf-8-sig")  # as spreadsheets write it
    else:
        lines = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_bytes(lines.encode("utf-8-sig"))
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_list_of_ones_own(pictures, kind):
    long = "a dog,\u2028a \x85 cat\x0c" + "\nand a bird" * (kind == "csv")  # these end no line
    source = ListOfEdits(write(pictures / f"edits.{kind}", [FULL, {"image": "dog.png", "prompt": long}]))
    assert names(source.entries) == "the-dog-1 0001_dog"
    task, plain = (source.load(entry, 32, 8) for entry in source.entries)
    assert all(getattr(task, name) == FULL[name] for name in ("prompt", "source_prompt", "negative_prompt", "category"))
    assert torch.equal(task.image, to_tensor(Image.open(pictures / "dog.png")))
    assert torch.equal(task.truth, to_tensor(Image.open(pictures / "true dog.png")))
    assert torch.equal(task.mask, to_tensor(Image.open(pictures / "mask.png"))[:, :1] / 2 + 0.5)
    assert plain.prompt == long.strip() and plain.source_prompt == plain.category == plain.negative_prompt == ""
    assert plain.mask is plain.truth is None and torch.equal(task.to(torch.device("cpu")).mask, task.mask)


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.jsonl", b'{"image": "dog.png"}', "line 1: .*prompt"),
        ("a.jsonl", b'\n{"image": "dog.png", "prompt": "x", "colour": 1}', "line 2: 'colour'"),
        ("a.jsonl", b'{"image": "dog.png", "prompt": "x", "name": "a"}\n' * 2, "line 2: .*folder a"),
        ("a.jsonl", (FAULTS / "prompt_list.jsonl").read_bytes(), "line 1: 'prompt' must"),
        ("a.csv", b"image,prompt\ndog.png,x,y\n", "line 2"),
        ("a.csv", b"image,prompt,prompt\ndog.png,x,y\n", "line 1.*twice"),
        ("a.jsonl", b'{"image": "dog.png", "prompt": "x", "prompt": "y"}', "line 1.*twice"),
        ("a.csv", b'image,prompt\ndog.png,x\ndog.png,"a cat\ndog.png,y\n', "line 3"),
        ("a.csv", b'image,prompt\ndog.png,"a "red" cat"\n', "line 2"),
        ("a.jsonl", b'\n{"image": "dog.png", "prompt": "a \\ud800 cat"}', "line 2"),
        ("a.jsonl", b'{"image": "gone.png", "prompt": "x"}', "gone.png"),
        ("a.jsonl", b'{"image": "dog.png", "prompt": "  "}', "line 1: .*prompt"),
        ("a.jsonl", b"[" * 10**5, "line 1"),
    ],
)
def test_a_broken_list_is_refused_by_its_line(tmp_path, name, content, wanted):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=wanted):
        ListOfEdits(str(tmp_path / name))


@pytest.mark.parametrize(("name", "fit"), [("truth", "keep"), ("mask", "crop")])
def test_a_picture_of_another_shape_is_refused(pictures, name, fit):
    """Before the work, and where it changed meanwhile."""
    path = write(pictures / "edits.jsonl", [FULL])
    source = ListOfEdits(path, fit=fit)
    Image.effect_noise((64, 63), 60).save(pictures / FULL[name])  # twice the size, but for a pixel
    assert getattr(source.load(source.entries[0], 32, 8), name).shape[2:] == (32, 32)
    Image.effect_noise((64, 48), 60).save(pictures / FULL[name])
    for refused in (lambda: source.load(source.entries[0], 32, 8), lambda: ListOfEdits(path, fit=fit)):
        with pytest.raises(InputError, match=name):
            refused()


def test_a_photograph_on_its_side_has_the_shape_of_its_mask(pictures):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size, options in ((FULL["image"], (48, 32), {"exif": exif}), (FULL["mask"], (64, 96), {})):
        Image.effect_noise(size, 60).save(pictures / name, **options)
    rows = [{name: FULL[name] for name in ("image", "mask", "prompt")}]
    source = ListOfEdits(write(pictures / "edits.jsonl", rows), fit="keep")
    task = source.load(source.entries[0], 64, 16)
    assert task.image.shape[2:] == task.mask.shape[2:] == (80, 48)


@given(st.text())
def test_a_folder_name_is_one_folder_and_none_that_a_run_writes(text):
    name = folder_name(text)
    assert name and not set(name) & set("./\\") and name[0] != "-" and len(name.encode()) <= 100
    assert name.lower() != "wandb" and folder_name(name) == name and folder_name("WandB") == "task"
