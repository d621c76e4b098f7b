"""The examples and commands of README and docs must work."""

import re
import shlex
import sys
import types

import pytest
from PIL import Image

import train  # noqa: F401 (registers the settings of training)
from evaluation import config
from files import CLONE
from samplers import Sampler
from tests.conftest import compose

PAGES = {page.name: page.read_text() for page in [CLONE / "README.md", *sorted((CLONE / "docs").glob("*.md"))]}
COMMANDS = [
    (program, arguments.partition("  #")[0])
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page, re.S)
    for program, arguments in re.findall(r"^(?:python|torchrun \S+) (edit|train)\.py ?(.*)$", block, re.M)
]


def blocks(word):
    return next(block for block in re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.S) if word in block)


def test_the_library_example_gives_the_picture_back(tmp_path, monkeypatch):
    monkeypatch.chdir(CLONE)
    exec(blocks("ddim.invert").replace("again.png", str(tmp_path / "again.png")), {})
    with Image.open(tmp_path / "again.png") as picture:
        assert picture.size == (64, 64)


def test_the_example_method_keeps_more_with_less_strength(tiny_model, task, edit, monkeypatch):
    module = types.ModuleType("methods.redraw")
    monkeypatch.setitem(sys.modules, "methods.redraw", module)
    exec(blocks("class Redraw"), module.__dict__)
    z = tiny_model.encode_image(task.image).double()
    distances = []
    for strength in (0.1, 0.9):
        [(settings, latent, _)], _, _ = edit(module.Redraw(Sampler(steps=10), strength=strength), tiny_model, task)
        assert settings == {"strength": strength}
        distances.append((latent - z).norm())
    assert distances[0] < distances[1]


@pytest.mark.parametrize(("program", "arguments"), COMMANDS)
def test_a_command_names_settings_that_exist(program, arguments):
    words = [word for word in shlex.split(arguments) if not word.startswith("-") and not word.startswith("hydra")]
    words = [re.sub(r"=([^\[',]*),.*", r"=\1", word) for word in words]  # of a sweep the first value
    words = [re.sub(r"^prompt=.*", "prompt=text", word) for word in words]
    compose(program, *words)


def test_the_page_of_methods_is_that_of_the_dataclasses():
    assert PAGES["methods.md"] == config.markdown()
