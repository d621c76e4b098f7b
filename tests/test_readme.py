"""What the README shows must work: its example method is run, and its tables name every setting and default."""

import re
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from data.tasks import EditTask
from errors import InputError
from methods.direct_inversion import DirectInversion
from methods.imagic import Imagic
from samplers import Sampler

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_example_method_runs(tiny_model):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "class SDEdit" in block)
    settings = yaml.safe_load(
        next(block for block in re.findall(r"```yaml\n(.*?)```", README, re.S) if "methods.sdedit" in block)
    )
    module = types.ModuleType("methods.sdedit")
    sys.modules["methods.sdedit"] = module
    exec(code, module.__dict__)
    assert settings.pop("_target_") == "methods.sdedit.SDEdit" and settings.pop("sampler") == "${sampler}"
    method = module.SDEdit(Sampler(steps=4), **settings)
    task = EditTask(torch.rand(1, 3, 32, 32) * 2 - 1, "a cat")
    with torch.no_grad():
        result = method.edit(tiny_model, task)
        little = module.SDEdit(Sampler(steps=50), strength=0.02).edit(tiny_model, task)
    assert result.edits[0].image.shape == (3, 32, 32) and result.edits[0].settings == {"strength": 0.6}
    far = (result.edits[0].image - result.reconstruction).abs().mean()
    near = (little.edits[0].image - little.reconstruction).abs().mean()
    assert near < far  # less of the trajectory keeps more of the picture
    with pytest.raises(InputError, match=r"method\.strength"):
        module.SDEdit(Sampler(), strength=2)


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
