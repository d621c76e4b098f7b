"""The page of a benchmark, as a browser sees it, and what a sweep over a benchmark ends with."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from reporting import plots
from reporting.comparison import compare
from reporting.logger import WandbLogger
from reporting.page import write_page
from reporting.sweep import read_jobs, swept
from reporting.tables import aligned, means, never_measured, show

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = 'a "red" <script>alert(1)</script> & <!--rows--> heart'


def record(task, category, success, psnr, sample=0, method="imagic", **settings):
    return {
        "task": task,
        "category": category,
        "method": method,
        "sample": sample,
        "settings": settings,
        "metrics": {"success": success, "psnr_to_input_kept": psnr, "psnr_to_truth": psnr / 2, "seconds": 2.0},
        "left_out": {"lpips_to_input": "it needs weights"},
        "file": f"{task}/edits/{sample:02d} a#1.png",
        "prompt": NASTY,
        "source_prompt": "a heart",
    }


def write_task(run, *records):
    """The folder of a task, as the runner leaves it."""
    place = run / records[0]["task"]
    (place / "edits").mkdir(parents=True)
    for name in ["input.png", "truth.png", *(r["file"].split("/", 1)[1] for r in records if "file" in r)]:
        Image.new("RGB", (64, 64), "red").save(place / name)
    (place / "result.json").write_text(json.dumps(records))
    return list(records)


class Page(HTMLParser):
    """The pictures, the addresses and the texts of each row of tasks."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(tmp_path):
    """Four tasks of two kinds by two methods, one of them failed once."""
    rows = []
    for place, method in (("0/", "imagic"), ("1/", "sdedit")):
        for i, success in enumerate((1, 0, 1, 0)):
            row = record(f"t{i}", "ab"[i % 2], success if method == "imagic" else 1 - success, 20.0 + i, method=method)
            write_task(tmp_path / place, row)
            rows.append(row | {"label": method, "place": place})
    failed = {"task": "t3", "category": "b", "prompt": NASTY, "error": "<b>too large</b>"}
    rows[-1] = failed | {"label": "sdedit", "place": "1/"}
    write_page(tmp_path / "index.html", "tasks & edits", rows)
    return tmp_path / "index.html"


def test_every_task_stands_with_its_input_edits_and_truth(page):
    seen = Page(page.read_text())
    files = [unquote(link) for link in seen.links]
    assert all((page.parent / file).is_file() for file in files)  # relative, and nothing from elsewhere
    for i in range(4):
        both = {f"0/t{i}/edits/00 a#1.png"} | ({f"1/t{i}/edits/00 a#1.png"} if i < 3 else set())
        assert {f"0/t{i}/input.png", f"0/t{i}/truth.png"} | both <= set(files)
    assert seen.text.count(NASTY) == 4 and seen.tags.count("script") == 1  # shown as it is, never obeyed
    assert "<b>too large</b>" in seen.text and "lpips_to_input: it needs weights" in seen.text
    assert "://" not in page.read_text()


def test_small_numbers_keep_their_digits(tmp_path):
    row = write_task(tmp_path, record("t0", "a", 1, 1.23456789e-7))[0] | {"label": "m", "place": ""}
    write_page(tmp_path / "index.html", "one task", [row])
    assert "1.23457e-07" in (tmp_path / "index.html").read_text()


def test_a_task_without_a_category_shows_none(tmp_path):
    rows = [write_task(tmp_path, record(f"t{i}", "a" * i, 1, 2.0))[0] | {"label": "m", "place": ""} for i in (0, 1)]
    write_page(tmp_path / "index.html", "two", rows)
    text = (tmp_path / "index.html").read_text()
    assert "<th>success: no category</th><th>success: a</th>" in text
    assert "<b>t0</b><br>from:" in text and "<b>t1</b><br>a<br>from:" in text


def test_tasks_of_one_name_in_two_lists_are_two(tmp_path):
    rows = [write_task(tmp_path / place, record("t0", "a", 1, 2.0))[0] | {"place": f"{place}/"} for place in "01"]
    rows = [row | {"label": "m", "prompt": prompt} for row, prompt in zip(rows, ("a cat", "a dog"), strict=True)]
    write_page(tmp_path / "index.html", "two lists", rows)
    assert (tmp_path / "index.html").read_text().count("<b>t0</b>") == 2


def browser(page, address="", script=""):
    """The page after its script, and then `script`, have run in Chromium."""
    file = page.with_name("driven.html")
    file.write_text(page.read_text().replace("</html>", f"<script>{script}</script></html>"))
    switches = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    command = [CHROMIUM, *switches, "--dump-dom", file.as_uri() + address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = done.stdout.split('<tbody id="tasks">')[1].split("</tbody>")[0]
    rows = [row for row in re.findall(r"<tr.*?</tr>", body, re.S) if " hidden" not in row[: row.index(">")]]
    shown = {}
    for row in rows:
        figures = re.findall(r"<figure.*?>", row)
        shown[re.search(r"<b>(\w+)</b>", row)[1]] = [
            re.search('label="(.*?)"', figure)[1] for figure in figures if " hidden" not in figure
        ]
    return shown, done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_sorts_and_filters_in_a_browser(page):
    shown, text = browser(page)
    assert shown == {f"t{i}": ["imagic", "sdedit"] for i in range(4)} and "4 of 4 tasks, 7 edits, 1 failed" in text
    shown, text = browser(page, "#label=imagic&success=yes&sort=psnr_to_truth&order=-1")
    assert list(shown.items()) == [("t2", ["imagic"]), ("t0", ["imagic"])] and "psnr to truth 11" in text
    script = """
        const set = (name, value) => {
          form.elements[name].value = value;
          form.dispatchEvent(new Event("input", {bubbles: true}));
        };
        const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        set("category", "b"); set("success", "failed"); set("words", "heart T3");
        document.title = location.hash;
        set("success", "*"); set("words", ""); set("sort", "seconds");  // one edit has no seconds
        press("j"); press("j"); press("k"); press("j"); press("j");
        document.activeElement.id = "here";
        document.querySelector("details").open = true;
        """
    shown, text = browser(page, "", script)
    assert shown == {"t1": ["imagic", "sdedit"], "t3": ["imagic", "sdedit"]}
    title = re.search("<title>(.*?)</title>", text)[1]
    assert all(part in title for part in ("category=b", "success=failed", "words=heart+T3"))
    assert re.search(r'<tr[^>]* id="here".*?<b>(\w+)</b>', text, re.S)[1] == "t3"  # j stops at the last


# Numbers over many edits.


def test_means_are_over_the_edits_that_have_the_number():
    rows = [
        {"metrics": {"a": 1.0, "b": 4.0}},
        {"metrics": {"a": 3.0}, "left_out": {"b": "no", "c": "why"}},
        {"error": "x"},
    ]
    assert means(rows) == {"edits": 2, "failed": 1, "a": 2.0, "b": 4.0} and means([]) == {"edits": 0, "failed": 0}
    assert never_measured(rows) == {"c": "why"}


def test_tables_line_up():
    lines = aligned({"a": {"edits": 100}, "b": {}}, ["edits"], "name").split("\n")
    assert lines == ["| name | edits |", "| ---- | ----- |", "| a    | 100   |", "| b    |       |"]
    shown = [
        show(n, v) for n, v in (("success", 0.254), ("psnr_to_input", 20.06), ("clip_score", 0.1234), ("edits", 3))
    ]
    assert [*shown, show("lpips", None)] == ["25%", "20.1", "0.123", "3", ""]


# A sweep over a benchmark.


def write_job(folder, number, overrides, *tasks):
    job = folder / str(number)
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides))
    for records in tasks:
        write_task(job, *records)


def test_a_sweep_over_a_benchmark_compares_methods_and_settings(tmp_path, capsys):
    from omegaconf import OmegaConf

    from reporting.sweep import Summary

    (tmp_path / "multirun.yaml").write_text("")
    task = "task=openmoji_edits"
    for number, (method, seed) in enumerate((m, s) for m in ("imagic", "sdedit") for s in (0, 1)):
        edits = [
            [
                record("t0", "pose", seed, 20.0, eta=eta, method=method) | {"sample": i}
                for i, eta in enumerate((0.4, 0.8))
            ],
            [record("t1", "style", 1, 30.0, eta=eta, method=method) for eta in (0.4, 0.8)],
        ]
        if method == "sdedit":
            edits = [[record("t0", "pose", 0, 25.0, method=method, strength=0.6)]]
            edits += [[{"task": "t1", "category": "style", "error": "no"}]] * (seed == 0)
        write_job(tmp_path, number, [f"method={method}", f"seed={seed}", task], *edits)
    rows = read_jobs(tmp_path)
    assert set(swept(rows)) == {"method", "seed", "edit.task", "edit.sample", "edit.eta"}
    Summary().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    told = capsys.readouterr().out
    assert "4 jobs, 0 failed" in told and "| imagic, eta 0.4 | 4 " in told.replace("     ", " ")
    with open(tmp_path / "comparison.csv", encoding="utf-8") as file:
        table = {row["edited_by"]: row for row in csv.DictReader(file)}
    assert list(table) == ["imagic, eta 0.4", "imagic, eta 0.8", "sdedit"]  # the seeds of each taken together
    first, last = table["imagic, eta 0.4"], table["sdedit"]
    assert (first["edits"], first["failed"], first["success"], first["psnr_to_input_kept"]) == (
        "4",
        "0",
        "0.75",
        "25.0",
    )
    assert (first["success_pose"], first["success_style"]) == ("0.5", "1.0")
    assert (last["edits"], last["failed"], last["success"], last["success_style"]) == ("2", "1", "0.0", "")
    assert all(Image.open(tmp_path / name).width > 300 for name in ("comparison.png", "summary.png"))
    page = (tmp_path / "index.html").read_text()
    assert page.count("<figure") == 4 + 4 + 3 and 'src="3/t0/edits/00%20a%231.png"' in page
    assert "comparison" in (tmp_path / "index.html").read_text()
    with open(tmp_path / "summary.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 11


def test_a_comparison_tells_of_jobs_that_failed_and_of_tasks_that_are_missing(tmp_path):
    """The method stands in each label though nobody typed it; what failed in a job counts for each of its edits; a
    failed job has a row."""
    tasks = [[record(f"t{i}", "pose", 1, 20.0, eta=eta) for eta in (0.2, 0.4)] for i in range(3)]
    failed = {"task": "t3", "category": "pose", "prompt": NASTY, "error": "no"}
    write_job(tmp_path, 0, ["a=1", "task.shard=0/2"], *tasks[:2])
    write_job(tmp_path, 1, ["a=1", "task.shard=1/2"], tasks[2], [failed])
    write_job(tmp_path, 2, ["a=2", "task.shard=0/2"], tasks[0])
    write_job(tmp_path, 3, ["a=2", "task.shard=1/2"])
    write_job(tmp_path, 4, ["a=3"])
    (tmp_path / "4" / "error.txt").write_text("no such setting")
    write_job(tmp_path, 5, ["a=4", "task=other"], [record("t0", "pose", 0, 20.0)])
    rows = read_jobs(tmp_path)
    compare(tmp_path, rows)
    with open(tmp_path / "comparison.csv", encoding="utf-8") as file:
        table = {row["edited_by"]: [row[n] for n in ("edits", "failed", "missing")] for row in csv.DictReader(file)}
    assert table == {
        "imagic, a 1, eta 0.2": ["3", "1", "0"],
        "imagic, a 1, eta 0.4": ["3", "1", "0"],
        "imagic, a 2, eta 0.2": ["1", "0", "3"],
        "imagic, a 2, eta 0.4": ["1", "0", "3"],
        "imagic, a 2": ["0", "0", "3"],  # the share that failed
        "imagic, a 3": ["0", "0", "4"],
        "imagic, a 4, task other": ["1", "0", "0"],
    }
    assert "| imagic, a 3 " in (tmp_path / "comparison.md").read_text()


def test_a_search_is_told_in_short_numbers(tmp_path, capsys):
    values = ("0.6292881023563949", "0.6292881023563951", "0.7291136198234518", "0.30000000000000004")
    for number, value in enumerate(values):
        write_job(tmp_path, number, [f"method.strength={value}"], [record("t0", "pose", 0, 20.0)])
    lines = compare(tmp_path, read_jobs(tmp_path))
    with open(tmp_path / "comparison.csv", encoding="utf-8") as file:
        labels = [row["edited_by"] for row in csv.DictReader(file)]
    assert labels == [f"imagic, strength {v}" for v in (*values[:2], "0.7291", "0.3")]  # no two become the same
    assert str(tmp_path / "comparison.md") in lines


def drawn(points, axes, monkeypatch, tmp_path):
    """The panel that `plot_points` makes."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots.plot_points(points, axes, tmp_path / "a.png")
    plots.plt.close(figures[0])
    return figures[0].axes[0]


def test_a_line_joins_points_only_along_one_number(monkeypatch, tmp_path):
    points = [(f"imagic, eta {eta}", x, 0.0) for eta, x in ((10, 3.0), (0.4, 5.0), (2, 1.0))]
    points += [(f"sdedit, strength {i / 10}, guidance {i}", 20.0 + i, 0.0) for i in range(3)]
    points += [("ddpm, a 1", 1.0, 0.0), ("ddpm, b 2", 2.0, 0.0), ("x, on yes", 1.0, 0.0), ("x, on no", 2.0, 0.0)]
    panel = drawn(points, ("psnr_to_input_kept", "success"), monkeypatch, tmp_path)
    found = {line.get_label(): (line.get_linestyle(), list(line.get_xdata())) for line in panel.lines}
    assert found["imagic"] == ("-", [5.0, 1.0, 3.0])  # in the order of eta
    assert {name: style for name, (style, _) in found.items() if name != "imagic"} == dict.fromkeys(
        ("sdedit", "ddpm", "x"), "None"
    )
    assert panel.get_xlabel() == "PSNR to input, kept part (dB)" and len(panel.texts) == len(points)
    assert -0.05 < panel.get_ylim()[0] < 0 < 0.1 < panel.get_ylim()[1] <= 1.05
    many = [(f"sdedit, strength {i}", float(i), i / 20) for i in range(21)]
    panel = drawn(many, ("psnr_to_input", "success"), monkeypatch, tmp_path)
    assert not panel.texts and panel.get_legend() and -0.05 < panel.get_ylim()[0] < panel.get_ylim()[1] < 1.05


def test_tables_of_wandb_hold_the_pictures(tmp_path):
    wandb = pytest.importorskip("wandb")
    Image.new("RGB", (600, 300)).save(tmp_path / "a.png")
    logger, logged = WandbLogger("offline"), {}
    logger.active = type("Run", (), {"log": staticmethod(logged.update)})
    both = {"task": "t0", "edit": tmp_path / "a.png", "success": 1.0, "truth": tmp_path / "a.png"}
    logger.table("results", [both, {"task": "t1", "error": "no"}])
    table = logged["results"]
    assert table.columns == ["task", "edit", "success", "truth", "error"]
    assert table.data[1] == ["t1", None, None, None, "no"]
    picture = table.data[0][1]  # once, and small
    assert isinstance(picture, wandb.Image) and picture.image.size == (256, 128) and table.data[0][3] is picture
    WandbLogger("disabled").table("results", [{"a": Path("nowhere.png")}])
