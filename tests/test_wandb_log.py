"""The W&B logger, against a stand-in for the library."""

import os
import sys
import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf
from PIL import Image

from data.images import CLONE
from errors import InputError
from evaluation.config import build
from evaluation.wandb_log import WandbLogger


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", library := MagicMock())
    library.errors.Error, library.Settings, library.Image = RuntimeError, SimpleNamespace, lambda picture: picture
    library.Table = lambda dataframe, allow_mixed_types: dataframe
    library.init.return_value.summary = {}
    return library


def logged(wandb):
    return [call.args[0] for call in wandb.init.return_value.log.call_args_list]


def test_each_stage_has_a_step_axis_and_each_sweep_is_a_group(tmp_path, wandb, monkeypatch):
    logger = WandbLogger(project="p")
    logger.scalars("before", 0, {"loss": 1})  # outside of a run nothing happens
    with logger.run(tmp_path, {"eta": 1}):
        for stage in ("embedding", "tuning"):
            logger.scalars(stage, 7, {"loss": 0.5})
    axes = {call.args[0]: call.kwargs.get("step_metric") for call in wandb.init.return_value.define_metric.mock_calls}
    assert axes["tuning/*"] == "tuning/step" and axes["embedding/*"] == "embedding/step"
    assert logged(wandb)[1:] == [{"tuning/loss": 0.5, "tuning/step": 7}]
    assert wandb.init.call_args.kwargs.items() >= {"mode": "offline", "dir": tmp_path, "group": None}.items()
    job = SimpleNamespace(mode=RunMode.MULTIRUN, sweep=SimpleNamespace(dir="multirun/x"))
    hydra = SimpleNamespace(initialized=lambda: True, get=lambda: job)
    monkeypatch.setattr("evaluation.wandb_log.HydraConfig", hydra)
    with pytest.raises(ValueError), logger.run(tmp_path, {}):
        raise ValueError
    assert wandb.init.call_args.kwargs["group"] == "multirun/x"
    assert [call.kwargs for call in wandb.init.return_value.finish.mock_calls] == [{"exit_code": i} for i in (0, 1)]


def test_the_report_is_logged_as_tables_pictures_and_means(tmp_path, wandb):
    for name in ("a.png", "b.png", "sheet.png"):
        Image.new("RGB", (600, 300)).save(tmp_path / name)
    row = {"task": "t", "method": "m", "prompt": "p", "input": "a.png"}
    rows = [row | {"psnr": n, "file": file} for n, file in ((1.0, "a.png"), (2.0, "b.png"))]
    rows.append({"task": "u", "error": "broken"})
    logger = WandbLogger()
    with logger.run(tmp_path, {}):
        logger.report(tmp_path, rows)
    (results, others), summary = logged(wandb), wandb.init.return_value.summary
    results = results["results"]
    assert len(results) == 3 and results["edit"][1].size == (256, 128) and results["edit"][2] is None
    assert results["input"][0] is results["input"][1]  # a picture is in memory once
    assert "sheet" in others and summary["psnr"] == 1.5 and summary["failed"] == 1


@pytest.mark.parametrize(
    "given", [{}, {"WANDB_MODE": "dryrun", "WANDB_DIR": "/x", "WANDB_SILENT": "false", "WANDB_NAME": "n"}]
)
def test_the_variables_of_wandb_win(tmp_path, wandb, monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    node = OmegaConf.load(CLONE / "conf" / "logger" / "wandb.yaml")
    with build({"logger": OmegaConf.to_container(node, resolve=True)}, "logger").run(tmp_path, {}, "imagic", "a dog"):
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "wandb")  # where tables wait for an upload
    assert "WANDB_DATA_DIR" not in os.environ
    about = wandb.init.call_args.kwargs
    assert about["mode"] == "offline" and about["project"] == "palimpsest"
    assert about["name"] == given.get("WANDB_NAME", "imagic: a dog")
    assert not {"tags", "entity"} & set(about)  # so W&B reads its own variables
    assert str(about["dir"]) == given.get("WANDB_DIR", str(tmp_path))
    assert hasattr(about["settings"], "silent") == ("WANDB_SILENT" not in given)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert OmegaConf.to_container(node, resolve=True).items() >= {"project": "mine", "mode": "disabled"}.items()


@pytest.mark.slow
def test_without_a_network_online_says_so_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    start = time.perf_counter()
    with pytest.raises(InputError, match="offline") as error, WandbLogger("online").run(tmp_path, {}):
        pass
    assert time.perf_counter() - start < 40 and "\n" not in str(error.value)


def test_disabled_never_imports_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    logger = WandbLogger("disabled")
    with logger.run(tmp_path, {}):
        logger.scalars("stage", 0, {"loss": 1.0})
        logger.report(tmp_path, [{"task": "t"}])
    assert WandbLogger(tags="abc").about == {"tags": ["abc"]}
    with pytest.raises(InputError, match=r"logger\.mode"):
        WandbLogger("on")
