"""The page of demo.py: in a headless Chromium from a click to an edit, which its command repeats, and to a mistake."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from PIL import Image

from errors import InputError
from methods.sdedit import SDEdit

pytest.importorskip("gradio", reason="the page needs gradio, extra demo")
import demo

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FIELD = "[...document.querySelectorAll('textarea')].find(t => t.closest('label').innerText.includes('strength'))"
CLICK = "!![...document.querySelectorAll('button')].find(b => b.innerText == 'Edit').click() || true"


@pytest.fixture
def until(tmp_path, monkeypatch):
    """A function that gives the value of a script on the page, as soon as it has one: Chromium, through two pipes."""
    monkeypatch.chdir(tmp_path)  # where the runs go
    page, numbers = demo.page(["method=sdedit", "sampler.steps=3"]), itertools.count()
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    (there, out), (into, here) = os.pipe(), os.pipe()
    flags = "--headless=new --no-sandbox --remote-debugging-pipe --user-data-dir=profile about:blank"
    command = ["bash", "-c", f"exec {CHROMIUM} {flags} 3<&{there} 4>&{here} 2>/dev/null"]
    process, answers = subprocess.Popen(command, pass_fds=(there, here)), os.fdopen(into, "rb")

    def call(method: str, session: dict, **params) -> dict:
        number, answer = next(numbers), {}
        os.write(out, json.dumps({"id": number, "method": method, "params": params} | session).encode() + b"\0")
        while answer.get("id") != number:
            answer = json.loads(b"".join(iter(lambda: answers.read(1), b"\0")))
        return answer["result"]

    target = call("Target.createTarget", {}, url=url)["targetId"]
    session = {"sessionId": call("Target.attachToTarget", {}, targetId=target, flatten=True)["sessionId"]}

    def until(script: str):
        for _ in range(600):
            found = call("Runtime.evaluate", session, expression=script, returnByValue=True)["result"]
            if found.get("value") and found["type"] != "object":
                return found["value"]
            time.sleep(0.2)
        raise AssertionError(f"nothing came of {script}")

    yield until
    process.kill()
    page.close()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
def test_from_click_to_picture(until, tmp_path):
    until(f"!!document.querySelector('canvas') && !!{FIELD}")
    until(CLICK)
    command = until("[...document.querySelectorAll('textarea')].map(t => t.value).find(v => v.includes('edit.py'))")
    words = ["input", "reconstruction", f"strength {SDEdit.strength}"]
    until(f"{words}.every(w => document.body.innerText.includes(w))")
    (edited,) = tmp_path.glob("outputs/*/*/edits/*.png")
    words = [str(demo.CLONE / "edit.py"), *shlex.split(command)[2:], "hydra.run.dir=again", "logger.mode=disabled"]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    (again,) = tmp_path.glob("again/edits/*.png")
    assert Image.open(edited).tobytes() == Image.open(again).tobytes()
    until(f"{FIELD}.value = '7'; !{FIELD}.dispatchEvent(new Event('input')) || true")
    until(CLICK)
    assert "method.strength is 7" in until("document.querySelector('.toast-body')?.innerText")


def test_every_method_has_fields_for_its_main_settings():
    for method in demo.composed([])[2]("method"):
        found = demo.settings(method, "openmoji64")
        assert found and all(demo.field(name, *of).value is not None for name, of in found.items()), method
    tune = demo.field("method.tune", *demo.settings("imagic", "openmoji64")["method.tune"])
    assert [value for _, value in tune.choices] == ["all", "attention", "lora"]
    for given in ("prompt=${oc.env:HOME}", "cache._target_=os.system"):  # of a page that others reach
        with pytest.raises(InputError):
            demo.composed([given])
