"""Reports as a function of rows: reading, means, tables, the sheet and plots. No edit and no failure vanishes."""

import html
import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.font_manager import fontManager
from PIL import Image, ImageColor

from evaluation import report


def edit(task="t0", category="", method="imagic", colour="blue", **about):
    """The row of an edit; `colour` is that of its picture, which `write_run` draws."""
    row = {"task": task, "category": category, "method": method, "prompt": f"a red {task}", "source_prompt": ""}
    row |= {"seed": 0, "sample": 0, "file": f"{task}/edits/{colour}.png", "input": f"{task}/input.png"}
    row |= {"clip_score": 0.25, "clip_similarity_to_input": 0.9, "seconds": 2.0}
    return row | about


def failure(task, category="", **about):
    row = {"task": task, "category": category, "prompt": f"a red {task}", "source_prompt": ""}
    return row | {"error": "too <b>large"} | about


def write_run(folder, rows):
    """A run's folder as the runner leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        for name in ("file", "input", "truth"):
            if name in row:
                (folder / row[name]).parent.mkdir(parents=True, exist_ok=True)
                colour = (folder / row[name]).stem if name == "file" else {"input": "black", "truth": "yellow"}[name]
                Image.new("RGB", (64, 64), colour).save(folder / row[name])
    return folder


def write_job(sweep, number, overrides, rows):
    """A job of a sweep: the runner puts the overrides, as texts, in every row."""
    folder = sweep / str(number)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {k}={v}\n" for k, v in overrides.items()))
    return write_run(folder, [overrides | row for row in rows]) if rows else folder


def test_reading_keeps_the_last_attempt_of_each_task(tmp_path):
    rows = [failure("t0"), failure("t1"), failure("t1"), edit("t0", success=0.0), edit("t0", success=1.0), edit("t2")]
    write_run(tmp_path, rows)
    (tmp_path / "rows-1.jsonl").write_text(json.dumps(edit("t3")) + "\n")
    found = report.read(tmp_path).set_index("task").sort_index()
    assert found["error"].notna().to_dict() == {"t0": False, "t1": True, "t2": False, "t3": False}
    assert found["success"]["t0"] == 1 and set(found["job"]) == {""}


def test_reading_a_sweep(tmp_path):
    """Jobs in the order of their numbers, with files relative to the sweep; a job without rows has failed."""
    for number in (2, 10, 9):
        write_job(tmp_path / "eta=1", number, {"method.eta": str(number)}, [edit("edit")])  # the sweep nests its jobs
    write_job(tmp_path / "eta=1", 11, {}, [])
    write_job(tmp_path / "eta=1", 12, {"task": "folder"}, [{"error": "no such list"}])
    rows = report.read(tmp_path)
    assert rows["job"].tolist() == ["eta=1/2", "eta=1/9", "eta=1/10", "eta=1/11", "eta=1/12"]
    assert rows["task"].isna().tolist() == [False, False, False, True, True]
    assert rows["file"][2] == "eta=1/10/edit/edits/blue.png" and rows["error"][3:].notna().all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([{"edit.eta": 0.4}, {"edit.eta": 0.8}], ["imagic, eta 0.4", "imagic, eta 0.8"]),
        ([{"model": "sd15", "job": "0"}, {"model": "sd21", "job": "1"}], ["imagic, model sd15", "imagic, model sd21"]),
        ([{"method": "sdedit", "job": "0", "edit.eta": 1}, {"job": "1", "edit.eta": 2}], ["sdedit", "imagic"]),
        # seeds, samples, pictures and shards are averaged
        ([{"job": i, "seed": i, "sample": i, "task.shard": i, "image": i, "pictures": i} for i in "01"], ["imagic"]),
    ],
)
def test_labels_are_the_settings_in_which_edits_differ(settings, expected):
    rows = pd.DataFrame([edit() | {"job": ""} | about for about in settings])
    assert list(dict.fromkeys(report.labelled(rows)["label"])) == expected


def test_means_and_standard_errors_by_hand():
    """Edits of one task are not independent: the error is that of the tasks' means."""
    values = {"t0": (0.0, 1.0), "t1": (1.0, 1.0), "t2": (0.0, 0.0)}
    rows = [edit(task, success=v, sample=i) for task, pair in values.items() for i, v in enumerate(pair)]
    rows += [edit("t3", psnr_to_truth=20.0), failure("t4")]  # a task without a truth has no success
    line = report.means(report.labelled(pd.DataFrame(rows)), ["label"]).iloc[0]
    assert (line["edits"], line["failed"], line["success"], line["psnr_to_truth"]) == (7, 1, 0.5, 20)
    assert line["success_se"] == pytest.approx(np.std([0.5, 1, 0], ddof=1) / math.sqrt(3))
    seeds = pd.DataFrame([edit(success=v, seed=i) for i, v in enumerate((0.0, 1.0, 1.0))])
    line = report.means(report.labelled(seeds), ["label"]).iloc[0]
    assert line["success_se"] == pytest.approx(np.std([0, 1, 1], ddof=1) / math.sqrt(3))  # one task: of the edits


# Files.


def test_the_report_on_a_benchmark(tmp_path):
    hostile, truth = 'a "red" <script>alert(1)</script> & {{ title }}', "t{}/truth.png".format
    rows = [edit(f"t{i}", "ab"[i % 2], success=float(i > 1), truth=truth(i), prompt=hostile) for i in range(4)]
    write_run(tmp_path, rows := [*rows, failure("t4", "b")])
    text = report.write(tmp_path, pd.DataFrame(rows), 6)
    table = (tmp_path / "table.md").read_text()
    assert "| a        | imagic    | 2     | 0      | 50% ± 50%" in table
    assert "| b        | imagic    | 2     | 1      | 50% ± 50%" in table
    assert "| imagic    | 4     | 1      | 50% ± 29%" in table and "4 of 6 tasks done, 1 failed" in table
    assert "4 of 6 tasks done, 1 failed" in text and str(tmp_path / "index.html") in text
    written = pd.read_csv(tmp_path / "results.csv")
    assert len(written) == 5 and written["error"].notna().sum() == 1 and written["success"].sum() == 2
    assert Image.open(tmp_path / "sheet.png").width > 192 * 3 and not list(tmp_path.glob(".*"))
    page = (tmp_path / "index.html").read_text()
    files = {html.unescape(link) for link in re.findall('(?:src|href)="(.*?)"', page)}
    assert files >= {row[name] for row in rows[:4] for name in ("file", "input", "truth")}
    assert all((tmp_path / file).is_file() for file in files)  # relative, and nothing from elsewhere
    text = html.unescape(re.sub("<.*?>", "", page))
    assert text.count(hostile) == 4 and page.count("<script") == 1  # shown as it is, never obeyed
    assert "too <b>large" in text


@pytest.mark.parametrize("edits", [1, 11])
def test_every_edit_of_one_picture_is_on_the_sheet(tmp_path, edits):
    palette = [f"#{20 * i + 10:02x}ff64" for i in range(edits)]
    rows = [edit("edit", colour=c, **{"edit.eta": i / 10, "edit.b": i}) for i, c in enumerate(palette)]
    write_run(tmp_path, rows)
    report.write(tmp_path, pd.DataFrame(rows), 1)
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    found = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert found >= {ImageColor.getrgb(colour) for colour in palette}


def test_a_prompt_in_any_script_can_be_drawn(tmp_path, recwarn, monkeypatch):
    """é, ü and $ always; Chinese by a font of the system, which a copy of matplotlib's own stands in for."""
    write_run(tmp_path, rows := [edit("edit", prompt="café für $x$ & $y")])
    monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist])
    own = next(font for font in fontManager.ttflist if font.name == "DejaVu Sans")
    fontManager.ttflist.append(replace(own, name="Some CJK SC"))
    report.write(tmp_path, pd.DataFrame(rows), 1)
    assert report.fonts()[0] == "DejaVu Sans" and "Some CJK SC" in report.fonts()
    assert not [str(w.message) for w in recwarn]


def test_a_cut_or_empty_file_of_rows_is_read(tmp_path):
    write_run(tmp_path, [edit("t0"), edit("t1")])
    whole = (tmp_path / "rows.jsonl").read_bytes()
    for length in (0, 1, len(whole) // 2 + 20, len(whole) - 1):
        (tmp_path / "rows.jsonl").write_bytes(whole[:length])
        assert len(report.run_rows(tmp_path)) == (length > len(whole) // 2) + (length > len(whole) - 2)
    foreign = b'7\nnull\n[]\n"x"\n{"task": ["t0"], "file": {}}\n' + b"[" * 10**5 + b"\n" + b"9" * 5000 + b"\n"
    cut = whole[: len(whole) // 2 + 20] + bytes(30) + b"\xff\xfe\n"
    (tmp_path / "rows.jsonl").write_bytes(cut + foreign + whole)
    assert len(report.run_rows(tmp_path)) == 2
