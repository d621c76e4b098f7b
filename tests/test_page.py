"""The page of a benchmark, as a browser shows it."""

import html
import re
import shutil
import subprocess
from urllib.parse import unquote

import pytest

from evaluation import report
from tests.test_report import edit, failure, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = 'a "red" <script>alert(1)</script> & {{ title }} heart'


@pytest.fixture
def page(tmp_path):
    """Four tasks of two categories by two methods, of which one failed once."""
    for job, method in enumerate(("imagic", "sdedit")):
        rows = [
            edit(f"t{i}", "ab"[i % 2], method, "#ff0000", prompt=HOSTILE, success=float((i + job) % 2 == 0))
            | {"truth": f"t{i}/truth.png", "psnr_to_truth": 10.0 + i}
            for i in range(4)
        ]
        write_run(tmp_path / str(job), rows if job == 0 else [*rows[:3], failure("t3", "b", prompt=HOSTILE)])
    path = tmp_path / "index.html"
    path.write_text(report.page("tasks & edits", report.labelled(report.read(tmp_path))), encoding="utf-8")
    return path


def test_every_task_stands_with_its_input_edits_and_truth(page):
    source = page.read_text()
    files = {unquote(html.unescape(link)) for link in re.findall('(?:src|href)="(.*?)"', source)}
    assert all((page.parent / file).is_file() for file in files)  # relative, and nothing from elsewhere
    for i in range(4):
        edits = {f"{job}/t{i}/edits/#ff0000.png" for job in range(2 if i < 3 else 1)}
        assert {f"0/t{i}/input.png", f"0/t{i}/truth.png"} | edits <= files
    text = html.unescape(re.sub("<.*?>", "", source))
    assert text.count(HOSTILE) == 4 and source.count("<script") == 1  # shown as it is, never obeyed
    assert "too <b>large" in text and source.count("<figure") == 8


def browser(page, address="", script=""):
    """The visible edits by task after the page's script, and then `script`, have run in Chromium; and its text."""
    file = page.with_name("driven.html")
    file.write_text(page.read_text().replace("</html>", f"<script>{script}</script></html>"))
    switches = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    command = [CHROMIUM, *switches, "--dump-dom", file.as_uri() + address]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    body = text.split('<tbody id="tasks">')[1].split("</tbody>")[0]
    rows = [row for row in re.findall(r"<tr.*?</tr>", body, re.S) if " hidden" not in row[: row.index(">")]]
    shown = {}
    for row in rows:
        figures = [figure for figure in re.findall(r"<figure.*?>", row) if " hidden" not in figure]
        shown[re.search(r"<b>(\w+)</b>", row)[1]] = [re.search('label="(.*?)"', figure)[1] for figure in figures]
    return shown, text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_sorts_and_filters_in_a_browser(page):
    shown, text = browser(page)
    assert shown == {f"t{i}": ["imagic", "sdedit"] for i in range(4)} and "4 of 4 tasks, 7 edits, 1 failed" in text
    shown, text = browser(page, "#label=imagic&outcome=yes&sort=psnr_to_truth&order=-1")
    assert list(shown.items()) == [("t2", ["imagic"]), ("t0", ["imagic"])] and "psnr to truth 12" in text
    script = """
        const set = (name, value) => {
          form.elements[name].value = value;
          form.dispatchEvent(new Event("input", {bubbles: true}));
        };
        set("category", "b"); set("outcome", "failed"); set("words", "heart T3");
        document.title = location.hash;
        set("outcome", "*"); set("words", ""); set("sort", "psnr_to_truth"); set("order", "-1");
        """
    shown, text = browser(page, "", script)
    assert list(shown.items()) == [("t3", ["imagic", "sdedit"]), ("t1", ["imagic", "sdedit"])]
    title = re.search("<title>(.*?)</title>", text)[1]
    assert all(part in title for part in ("category=b", "outcome=failed", "words=heart+T3"))
