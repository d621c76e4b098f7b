"""The page of a benchmark: every task is on it, and no text of a prompt is obeyed."""

import html
import re
from urllib.parse import unquote

from evaluation import report
from tests.test_report import edit, failure, write_run

HOSTILE = 'a "red" <script>alert(1)</script> & {{ title }} heart'


def test_every_task_stands_with_its_input_edits_and_truth(tmp_path):
    """Four tasks of two categories by two methods, of which one failed once."""
    for job, method in enumerate(("imagic", "sdedit")):
        rows = [
            edit(f"t{i}", "ab"[i % 2], method, "#ff0000", prompt=HOSTILE, success=float((i + job) % 2 == 0))
            | {"truth": f"t{i}/truth.png", "psnr_to_truth": 10.0 + i}
            for i in range(4)
        ]
        write_run(tmp_path / str(job), rows if job == 0 else [*rows[:3], failure("t3", "b", prompt=HOSTILE)])
    source = report.page("tasks & edits", report.labelled(report.read(tmp_path)))
    files = {unquote(html.unescape(link)) for link in re.findall('(?:src|href)="(.*?)"', source)}
    assert all((tmp_path / file).is_file() for file in files)  # relative, and nothing from elsewhere
    for i in range(4):
        edits = {f"{job}/t{i}/edits/#ff0000.png" for job in range(2 if i < 3 else 1)}
        assert {f"0/t{i}/input.png", f"0/t{i}/truth.png"} | edits <= files
    text = html.unescape(re.sub("<.*?>", "", source))
    assert text.count(HOSTILE) == 4 and source.count("<script") == 1  # shown as it is, never obeyed
    assert "too <b>large" in text and source.count("<figure") == 8
