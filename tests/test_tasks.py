"""Lists of tasks: what is chosen from them, how processes share them, and what is read from each benchmark's folder."""

import csv
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.benchmarks import PIE_TYPES, ListOfEdits, PieBench, TedBench, decode_mask, folder_name
from data.images import to_tensor
from data.tasks import Entry, Tasks, chosen
from errors import InputError

KINDS = ["a", "b", "a", "c", "b", "a", "a"]
ENTRIES = [Entry(f"{i}{kind}", "a cat", category=kind) for i, kind in enumerate(KINDS)]


def names(entries):
    return [entry.name for entry in entries]


# What is chosen, and who gets it.


def test_categories_and_limit_choose():
    assert names(chosen(ENTRIES, None, None)) == names(ENTRIES)
    assert names(chosen(ENTRIES, ["c", "a"], None)) == ["0a", "2a", "3c", "5a", "6a"]
    assert names(chosen(ENTRIES, "b", 1)) == ["1b"]
    assert names(chosen(ENTRIES, None, 2)) == ["0a", "1b", "2a", "3c", "4b"]
    for wrong, told in (({"categories": "d"}, "choose from a, b, c"), ({"limit": 0}, "task.limit=0")):
        with pytest.raises(InputError, match=told):
            Tasks(ENTRIES, **wrong)
    with pytest.raises(InputError, match="nothing to edit"):
        Tasks([])


@given(st.integers(0, 40), st.integers(1, 9))
def test_shards_share_every_task_once_and_evenly(count, shards):
    entries = [Entry(str(i), "a cat") for i in range(count + 1)]
    shares = [Tasks(entries, shard=f"{i}/{shards}").share for i in range(shards)]
    assert sorted((name for share in shares for name in names(share)), key=int) == names(entries)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_torchrun_shares_where_no_shard_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert names(Tasks(ENTRIES).share) == ["1b", "4b"]
    assert names(Tasks(ENTRIES, shard="0/2").share) == ["0a", "2a", "4b", "6a"]
    assert names(Tasks(ENTRIES).entries) == names(ENTRIES)


@pytest.mark.parametrize("shard", ["4/4", "-1/4", "1", "a/b", "0/0", "1/2/3", 3])
def test_a_senseless_shard_is_refused(shard):
    with pytest.raises(InputError, match="for example 0/4"):
        Tasks(ENTRIES, shard=shard)


# PIE-Bench.


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 80)), max_size=6))
def test_a_mask_is_read_like_the_definition_says(runs):
    expected = [[0] * 8 for _ in range(8)]
    for start, length in runs:
        for pixel in range(start, min(start + length, 64)):
            expected[pixel // 8][pixel % 8] = 1
    assert decode_mask([number for run in runs for number in run], side=8).tolist() == expected


@pytest.mark.parametrize("runs", [[1], [-1, 3], [64, 1], [3, -1]])
def test_a_mask_of_no_pairs_is_refused(runs):
    with pytest.raises(InputError, match="pairs of start and length"):
        decode_mask(runs, side=8)


@pytest.fixture
def pie(tmp_path):
    """Two of its images: an edit in the rows 100 to 199, and one whose file is missing."""
    folder = tmp_path / "pie"
    (folder / "annotation_images" / "6_change_attribute_color_40").mkdir(parents=True)
    image = "6_change_attribute_color_40/611000000000.jpg"
    Image.effect_noise((512, 512), 60).convert("RGB").save(folder / "annotation_images" / image)
    shared = {"editing_instruction": "", "blended_word": "bird bird"}
    mapping = {
        "611000000000": {
            **shared, "image_path": image, "original_prompt": "a [blue] bird", "editing_prompt": "a [red] bird",
            "editing_type_id": "6", "mask": [512 * 100, 512 * 100],
        },
        "000000000000": {
            **shared, "image_path": "0_random_140/0.jpg", "original_prompt": "a cat", "editing_prompt": "a [fat] cat",
            "editing_type_id": "0", "mask": [],
        },
    }  # fmt: skip
    (folder / "mapping_file.json").write_text(json.dumps(mapping))
    return folder


def test_pie_bench(pie):
    source = PieBench(str(pie))
    first, second = source.entries
    assert (first.name, first.prompt, first.source_prompt) == ("611000000000", "a red bird", "a blue bird")
    assert [first.category, second.category] == ["change_color", "random"] and len(PIE_TYPES) == 10
    task = source.load(first, 512)
    assert task.image.shape == (1, 3, 512, 512) and task.mask.shape == (1, 1, 512, 512) and task.truth is None
    assert set(task.mask.unique().tolist()) == {0, 1}
    assert task.mask[0, 0, 1:-1, 1:-1].sum(1).nonzero().flatten().tolist() == list(range(99, 199))
    small = source.load(first, 64, 16)
    for mask in (task.mask[0, 0], small.mask[0, 0]):
        assert mask[[0, -1]].all() and mask[:, [0, -1]].all()
    assert small.mask[0, 0, 13:24].all() and not small.mask[0, 0, 26:-1, 1:-1].any()  # rows 12.5 to 25 of 64
    with pytest.raises(InputError, match=r"0\.jpg"):
        source.load(second, 512)


def test_a_padded_mask_counts_the_bars_as_edited(tmp_path):
    Image.new("RGB", (40, 20), "gray").save(tmp_path / "x.png")
    Image.new("L", (40, 20), 0).save(tmp_path / "m.png")
    (tmp_path / "l.jsonl").write_text(json.dumps({"image": "x.png", "prompt": "a cat", "mask": "m.png"}))
    source = ListOfEdits(str(tmp_path / "l.jsonl"), fit="pad")
    mask = source.load(source.entries[0], 32).mask[0, 0]
    assert mask[:8].all() and mask[24:].all() and not mask[8:24].any()


@pytest.mark.parametrize(("make", "url"), [(PieBench, "PnPInversion"), (TedBench, "imagic-editing")])
def test_a_missing_folder_says_where_the_data_comes_from(make, url, tmp_path):
    for path in (None, str(tmp_path), str(tmp_path / "no")):
        with pytest.raises(InputError, match=url) as error:
            make(path)
        assert "\n" not in str(error.value) and "task.path" in str(error.value)


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": {"editing_type_id": "x"}}', '{"a": {"editing_type_id": "99"}}'])
def test_a_mapping_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "mapping_file.json").write_text(content)
    with pytest.raises(InputError, match=r"mapping_file\.json"):
        PieBench(str(tmp_path))


# TEdBench.


def test_tedbench(tmp_path):
    (tmp_path / "originals").mkdir()
    Image.new("RGB", (60, 40), "red").save(tmp_path / "originals" / "dog_01.jpeg")
    texts = ["A photo of a sitting dog.", "A photo of a jumping dog."]
    (tmp_path / "input_list.json").write_text(
        json.dumps([{"img_name": "dog_01.jpeg", "target_text": text} for text in texts])
    )
    source = TedBench(str(tmp_path), fit="keep")
    assert names(source.entries) == ["000_dog_01", "001_dog_01"]
    task = source.load(source.entries[1], 32, 8)
    assert task.prompt == texts[1] and task.image.shape == (1, 3, 24, 40) and task.mask is task.truth is None


# A list of one's own.


@pytest.fixture
def pictures(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("dog", "true dog", "mask"):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels if name != "mask" else (pixels // 128 * 255)[..., 0]).save(tmp_path / f"{name}.png")
    return tmp_path


FULL = {
    "image": "dog.png", "prompt": "a “sitting” dog, asleep", "source_prompt": "a dog", "mask": "mask.png",
    "truth": "true dog.png", "category": "pose", "name": "the dog/1",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_list_of_ones_own(pictures, kind):
    rows = [FULL, {"image": "dog.png", "prompt": "a cat"}]
    path = pictures / f"edits.{kind}"
    if kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
            writer = csv.DictWriter(file, list(FULL))
            writer.writeheader()
            writer.writerows(rows)
    source = ListOfEdits(str(path))
    assert names(source.entries) == ["the-dog-1", "0001_dog"]
    task, plain = (source.load(entry, 32, 8) for entry in source.entries)
    assert (task.prompt, task.source_prompt, task.category) == (FULL["prompt"], "a dog", "pose")
    assert torch.equal(task.image, to_tensor(Image.open(pictures / "dog.png")))
    assert torch.equal(task.truth, to_tensor(Image.open(pictures / "true dog.png")))
    assert torch.equal(task.mask, to_tensor(Image.open(pictures / "mask.png"))[:, :1] / 2 + 0.5)
    assert plain.source_prompt == plain.category == "" and plain.mask is plain.truth is None
    assert torch.equal(task.to(torch.device("cpu")).mask, task.mask)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_line_ends_where_its_format_says(pictures, kind):
    """And not at what Unicode calls a line's end; a cell of CSV may hold several lines."""
    prompt = "a dog,\u2028a \x85 cat\x0c" + "\nand a bird" * (kind == "csv")
    cells = {"image": "dog.png", "prompt": prompt, "source_prompt": "a dog"}
    with open(pictures / f"edits.{kind}", "w", newline="", encoding="utf-8") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, list(cells))
            writer.writeheader()
            writer.writerow(cells)
        else:
            file.write(json.dumps(cells, ensure_ascii=False) + "\r\n")
    (entry,) = ListOfEdits(str(pictures / f"edits.{kind}")).entries
    assert (entry.prompt, entry.source_prompt) == (prompt.strip(), "a dog")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"image": "dog.png"}', "line 1: prompt is missing"),
        ('\n{"image": "dog.png", "prompt": "x", "colour": 1}', "line 2: colour is unknown"),
        ('{"image": "dog.png",', "line 1 is not JSON"),
        ("[1]", "line 1: wanted"),
        ('{"image": "dog.png", "prompt": "x", "name": "a"}\n' * 2, "two tasks would have the folder a"),
        ("\n", "nothing to edit"),
    ],
)
def test_a_broken_list_is_refused_by_its_line(pictures, content, told):
    (pictures / "edits.jsonl").write_text(content)
    with pytest.raises(InputError, match=told):
        ListOfEdits(str(pictures / "edits.jsonl"))


def test_what_cannot_be_a_list_is_refused(pictures):
    for path, told in (
        (None, "task.path is missing"),
        ("no.csv", "no such file"),
        (str(pictures / "dog.png"), "UTF-8"),
    ):
        with pytest.raises(InputError, match=told):
            ListOfEdits(path)
    (pictures / "edits.csv").write_text("image,prompt\ndog.png,x,y\n")
    with pytest.raises(InputError, match="line 2: a cell without a header is unknown"):
        ListOfEdits(str(pictures / "edits.csv"))
    (pictures / "edits.txt").write_text("")
    with pytest.raises(InputError, match=r"\.csv or a \.jsonl"):
        ListOfEdits(str(pictures / "edits.txt"))


@pytest.mark.parametrize("name", ["truth", "mask"])
def test_a_picture_of_another_shape_is_refused(pictures, name):
    Image.new("RGB", (64, 48)).save(pictures / FULL[name])
    (pictures / "edits.jsonl").write_text(json.dumps(FULL))
    told = rf"^the {name} .*{FULL[name]} has another shape, 64 x 48 pixels, than its image, \d+ x \d+$"
    for fit in ("keep", "crop", "pad", "stretch"):
        source = ListOfEdits(str(pictures / "edits.jsonl"), fit=fit)
        with nullcontext() if fit == "stretch" else pytest.raises(InputError, match=told):
            source.load(source.entries[0], 32, 8)
    Image.new("RGB", (64, 63)).save(pictures / FULL[name])  # twice the size, but for a pixel
    source = ListOfEdits(str(pictures / "edits.jsonl"))
    assert getattr(source.load(source.entries[0], 32, 8), name).shape[2:] == (32, 32)


@given(st.text())
def test_a_folder_name_is_one_folder(text):
    name = folder_name(text)
    assert name and not set(name) & set("./\\") and name[0] != "-" and len(name.encode()) <= 100


@pytest.mark.parametrize("name", ["results.csv", "Index.html", "wandb", "WandB", ".hydra", "edit.log"])
def test_a_task_is_not_named_like_what_the_run_writes(name):
    assert folder_name(name).lower() != name.lower() and folder_name(folder_name(name)) == folder_name(name)
    assert folder_name("a" + "é" * 99) == "a" + "é" * 49
