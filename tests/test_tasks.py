"""Lists of tasks: which of them are chosen, how processes share them, and what each benchmark's folder holds."""

import csv
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.benchmarks import PIE_TYPES, ListOfEdits, PieBench, TedBench, decode_mask, folder_name
from data.images import to_tensor
from data.tasks import Entry, OneImage, Tasks, chosen
from errors import InputError

FAULTS = Path(__file__).parent / "fixtures" / "faults"
ENTRIES = [Entry(f"{i}{kind}", "a cat", category=kind) for i, kind in enumerate("abacbaa")]


def names(entries):
    return [entry.name for entry in entries]


# Which are chosen, and who gets them.


def test_categories_and_limit_choose():
    assert names(chosen(ENTRIES, None, None)) == names(ENTRIES)
    assert names(chosen(ENTRIES, ["c", "a"], None)) == ["0a", "2a", "3c", "5a", "6a"]
    assert names(chosen(ENTRIES, "b", 1)) == ["1b"]
    assert names(chosen(ENTRIES, None, 2)) == ["0a", "1b", "2a", "3c", "4b"]
    for wrong in ({"categories": "d"}, {"limit": 0}, {"limit": "x"}, {"fit": "squash"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Tasks(ENTRIES, **wrong)
    with pytest.raises(InputError):
        Tasks([])


@given(st.integers(1, 40), st.integers(1, 9))
def test_shards_share_every_task_once_and_evenly(count, shards):
    entries = [Entry(str(i), "a cat") for i in range(count)]
    shares = [Tasks(entries, shard=f"{i}/{shards}").share for i in range(shards)]
    assert sorted((name for share in shares for name in names(share)), key=int) == names(entries)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_torchrun_shares_a_list_and_refuses_one_picture(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert names(Tasks(ENTRIES).share) == ["1b", "4b"] and names(Tasks(ENTRIES).entries) == names(ENTRIES)
    assert names(Tasks(ENTRIES, shard="0/2").share) == ["0a", "2a", "4b", "6a"]
    for shard in ("4/4", "-1/4", "1", "a/b", "0/0", 3):
        with pytest.raises(InputError, match="shard"):
            Tasks(ENTRIES, shard=shard)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="torchrun"):
        OneImage(str(tmp_path / "x.png"), "a cat")


# One picture.


def test_one_image(tmp_path):
    file = tmp_path / "x.png"
    Image.new("RGB", (8, 4), "red").save(file)
    source = OneImage(str(file), "  a cat ", fit="pad")
    Image.new("RGB", (8, 4), "blue").save(file)  # the constructor has not read the pixels
    task = source.load(*source.share, 16)
    assert (task.name, task.prompt, task.source_prompt, task.image.shape) == ("edit", "a cat", "", (1, 3, 16, 16))
    assert task.image[0, :, 8, 8].tolist() == [-1, -1, 1] and source.single
    example = {"image": str(file), "prompt": "a dog", "source_prompt": "a cat"}
    source = OneImage(None, None, fit="keep", example=example)
    task = source.load(*source.share, 64, 64)
    assert (task.prompt, task.source_prompt, task.image.shape) == ("a dog", "a cat", (1, 3, 64, 64))
    (tmp_path / "text.png").write_text("no picture")
    for image, prompt, wanted in (
        (str(file), None, "prompt"),  # the example's prompt is for its own picture
        (None, " ", "prompt"),
        (str(tmp_path / "missing.png"), "a cat", "missing"),
        (str(tmp_path / "text.png"), "a cat", r"text\.png"),
    ):
        with pytest.raises(InputError, match=wanted):
            OneImage(image, prompt, example=example)


# PIE-Bench and TEdBench.


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 80)), max_size=6))
def test_a_mask_is_read_as_it_is_defined(runs):
    expected = [[0] * 8 for _ in range(8)]
    for start, length in runs:
        for pixel in range(start, min(start + length, 64)):
            expected[pixel // 8][pixel % 8] = 1
    assert decode_mask([number for run in runs for number in run], side=8).tolist() == expected


def test_pie_bench(tmp_path):
    image = "6_change_attribute_color_40/611000000000.jpg"
    (tmp_path / "annotation_images" / image).parent.mkdir(parents=True)
    Image.effect_noise((512, 512), 60).convert("RGB").save(tmp_path / "annotation_images" / image)
    item = {"image_path": image, "original_prompt": "a [blue] bird", "editing_prompt": "a [red] bird"}
    mapping = {
        "611000000000": item | {"editing_type_id": "6", "mask": [512 * 100, 512 * 100]},  # rows 100 to 199
        "000000000000": item | {"editing_type_id": "0", "mask": [], "image_path": "0_random_140/0.jpg"},
    }
    (tmp_path / "mapping_file.json").write_text(json.dumps(mapping))
    source = PieBench(str(tmp_path))
    first, second = source.entries
    assert (first.name, first.prompt, first.source_prompt) == ("611000000000", "a red bird", "a blue bird")
    assert [first.category, second.category] == ["change_color", "random"] and len(PIE_TYPES) == 10
    task, small = source.load(first, 512), source.load(first, 64, 16)
    assert task.image.shape == (1, 3, 512, 512) and task.mask.shape == (1, 1, 512, 512) and task.truth is None
    assert task.mask[0, 0, 1:-1, 1:-1].sum(1).nonzero().flatten().tolist() == list(range(99, 199))
    assert small.mask[0, 0, 13:24].all() and not small.mask[0, 0, 26:-1, 1:-1].any()  # rows 12.5 to 25 of 64
    for mask in (task.mask[0, 0], small.mask[0, 0]):
        assert set(mask.unique().tolist()) == {0, 1} and mask[[0, -1]].all() and mask[:, [0, -1]].all()
    with pytest.raises(InputError, match=r"0\.jpg"):
        source.load(second, 512)


def test_tedbench(tmp_path):
    (tmp_path / "originals").mkdir()
    Image.new("RGB", (60, 40), "red").save(tmp_path / "originals" / "dog_01.jpeg")
    texts = ["A photo of a sitting dog.", "A photo of a jumping dog."]
    items = [{"img_name": "dog_01.jpeg", "target_text": text} for text in texts]
    (tmp_path / "input_list.json").write_text(json.dumps(items))
    source = TedBench(str(tmp_path), fit="keep")
    assert names(source.entries) == ["000_dog_01", "001_dog_01"]
    task = source.load(source.entries[1], 32, 8)
    assert task.prompt == texts[1] and task.image.shape == (1, 3, 24, 40) and task.mask is task.truth is None


@pytest.mark.parametrize(("make", "url"), [(PieBench, "PnPInversion"), (TedBench, "imagic-editing")])
def test_a_missing_folder_is_answered_with_the_address_of_the_data(make, url, tmp_path):
    for path in (None, str(tmp_path)):
        with pytest.raises(InputError, match=f"task.path.*{url}"):
            make(path)


# A list of one's own.

FULL = {
    "image": "dog.png", "prompt": "a “sitting” dog, asleep", "source_prompt": "a dog", "mask": "mask.png",
    "truth": "true dog.png", "category": "pose", "name": "the dog/1",
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("dog", "true dog", "mask"):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels if name != "mask" else (pixels // 128 * 255)[..., 0]).save(tmp_path / f"{name}.png")
    return tmp_path


def write(path, rows):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_list_of_ones_own(pictures, kind):
    long = "a dog,\u2028a \x85 cat\x0c" + "\nand a bird" * (kind == "csv")  # these end no line
    source = ListOfEdits(write(pictures / f"edits.{kind}", [FULL, {"image": "dog.png", "prompt": long}]))
    assert names(source.entries) == ["the-dog-1", "0001_dog"]
    task, plain = (source.load(entry, 32, 8) for entry in source.entries)
    assert (task.prompt, task.source_prompt, task.category) == (FULL["prompt"], "a dog", "pose")
    assert torch.equal(task.image, to_tensor(Image.open(pictures / "dog.png")))
    assert torch.equal(task.truth, to_tensor(Image.open(pictures / "true dog.png")))
    assert torch.equal(task.mask, to_tensor(Image.open(pictures / "mask.png"))[:, :1] / 2 + 0.5)
    assert plain.prompt == long.strip() and plain.source_prompt == plain.category == ""
    assert plain.mask is plain.truth is None and torch.equal(task.to(torch.device("cpu")).mask, task.mask)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ('{"image": "dog.png"}', "line 1: prompt"),
        ('\n{"image": "dog.png", "prompt": "x", "colour": 1}', "line 2: colour"),
        ('{"image": "dog.png",', "line 1"),
        ("[1]", "line 1"),
        ('{"image": "dog.png", "prompt": "x", "name": "a"}\n' * 2, "folder a"),
        ("\n", "nothing"),
        ((FAULTS / "prompt_list.jsonl").read_text(), "line 1: prompt must be one text"),
    ],
)
def test_a_broken_list_is_refused_by_its_line(pictures, content, wanted):
    (pictures / "edits.jsonl").write_text(content)
    with pytest.raises(InputError, match=wanted):
        ListOfEdits(str(pictures / "edits.jsonl"))


def test_other_files_are_no_lists(pictures):
    shutil.copy(pictures / "dog.png", pictures / "dog.csv")
    (pictures / "edits.csv").write_text("image,prompt\ndog.png,x,y\n")
    (pictures / "edits.txt").write_text("")
    for name, wanted in (("no.csv", "no such"), ("dog.csv", "UTF-8"), ("edits.csv", "line 2"), ("edits.txt", "csv")):
        with pytest.raises(InputError, match=wanted):
            ListOfEdits(str(pictures / name))
    with pytest.raises(InputError):
        ListOfEdits(None)


def test_a_mask_is_fitted_like_its_picture_and_bars_count_as_edited(pictures):
    Image.new("RGB", (40, 20), "gray").save(pictures / "dog.png")
    mask = Image.new("L", (40, 20), 0)
    mask.paste(1, (0, 0, 20, 20))  # some programs write 1, not 255
    mask.save(pictures / "mask.png")
    row = {"image": "dog.png", "prompt": "a cat", "mask": "mask.png"}
    source = ListOfEdits(write(pictures / "l.jsonl", [row]), fit="pad")
    mask = source.load(source.entries[0], 32).mask[0, 0]
    assert mask[:8].all() and mask[24:].all() and mask[8:24, :15].all() and not mask[8:24, 17:].any()


@pytest.mark.parametrize("name", ["truth", "mask"])
def test_a_picture_of_another_shape_is_refused(pictures, name):
    path = write(pictures / "edits.jsonl", [FULL])
    Image.effect_noise((64, 48), 60).save(pictures / FULL[name])
    for fit in ("keep", "crop", "pad", "stretch"):
        source = ListOfEdits(path, fit=fit)
        with nullcontext() if fit == "stretch" else pytest.raises(InputError, match=f"{name} .*64 x 48.*32 x 32"):
            source.load(source.entries[0], 32, 8)
    Image.effect_noise((64, 63), 60).save(pictures / FULL[name])  # twice the size, but for a pixel
    source = ListOfEdits(path)
    assert getattr(source.load(source.entries[0], 32, 8), name).shape[2:] == (32, 32)


@given(st.text())
def test_a_folder_name_is_one_folder_and_none_that_a_run_writes(text):
    name = folder_name(text)
    assert name and not set(name) & set("./\\") and name[0] != "-" and len(name.encode()) <= 100
    assert name.lower() != "wandb" and folder_name(name) == name and folder_name("WandB") == "task"
