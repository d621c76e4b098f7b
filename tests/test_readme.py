"""What the README shows must work: its example method is run, and its tables name every setting and default."""

import re
import sys
import types
from dataclasses import fields
from pathlib import Path

import hydra
import pytest
import torch
import yaml

from data.images import bucket
from data.tasks import EditTask
from errors import InputError
from methods.direct_inversion import DirectInversion
from methods.imagic import Imagic
from samplers import Sampler

README = (Path(__file__).parents[1] / "README.md").read_text()
CONF = Path(__file__).resolve().parents[1] / "conf"


def test_example_method_runs(tiny_model):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "class Redraw" in block)
    settings = yaml.safe_load(
        next(block for block in re.findall(r"```yaml\n(.*?)```", README, re.S) if "methods.redraw" in block)
    )
    module = types.ModuleType("methods.redraw")
    sys.modules["methods.redraw"] = module
    exec(code, module.__dict__)
    assert settings.pop("_target_") == "methods.redraw.Redraw" and settings.pop("sampler") == "${sampler}"
    method = module.Redraw(Sampler(steps=4), **settings)
    task = EditTask(torch.rand(1, 3, 32, 32) * 2 - 1, "a cat")
    with torch.no_grad():
        result = method.edit(tiny_model, task)
        little = module.Redraw(Sampler(steps=50), strength=0.02).edit(tiny_model, task)
    assert result.edits[0].image.shape == (3, 32, 32) and result.edits[0].settings == {"strength": 0.6}
    far = (result.edits[0].image - result.reconstruction).abs().mean()
    near = (little.edits[0].image - little.reconstruction).abs().mean()
    assert near < far  # less of the trajectory keeps more of the picture
    with pytest.raises(InputError, match=r"method\.strength"):
        module.Redraw(Sampler(), strength=2)


@pytest.mark.parametrize("method", [Imagic, DirectInversion])
def test_every_setting_is_in_the_tables_with_its_default(method):
    rows = {}
    for names, default in re.findall(r"^\| (`method\.[^|]*) \| ([^|]*) \|", README, re.M):
        names = re.findall(r"`method\.(\w+)`", names)
        defaults = default.split(",") if len(names) > 1 else [default]
        for name, value in zip(names, defaults, strict=True):
            rows.setdefault(name, []).append(yaml.safe_load(value.strip()))
    for field in fields(method):
        if field.name != "sampler":
            default = field.default
            shown = [float(v) if isinstance(default, float) and v is not None else v for v in rows[field.name]]
            assert default in shown, field.name


def test_the_table_of_stable_diffusion_is_that_of_the_settings():
    rows = re.findall(r"^\| `(sd\w+)` \| `([^`]+)` \| (\d+) \| (\w+) \|$", README, re.M)
    assert {name for name, *_ in rows} == {file.stem for file in (CONF / "model").glob("sd*.yaml")}
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for name, weights, side, prediction in rows:
            model = hydra.compose("edit", [f"model={name}"]).model
            assert (model.weights, model.arch.image_size, model.arch.prediction) == (weights, int(side), prediction)
    assert bucket(4000, 3000, 512, 64) == (576, 448) and "photograph of 4000×3000 is edited at 576×448" in README
