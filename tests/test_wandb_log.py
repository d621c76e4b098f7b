"""The W&B logger, against a stand-in for the library."""

import os
import sys
import time
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from PIL import Image

from data.images import CLONE
from errors import InputError
from evaluation.config import build
from evaluation.wandb_log import WandbLogger


class Wandb:
    """Records what is logged."""

    Settings = SimpleNamespace
    errors = SimpleNamespace(Error=RuntimeError)
    Image = staticmethod(lambda picture: ("image", picture))
    Table = staticmethod(lambda dataframe, allow_mixed_types: dataframe)

    def __init__(self):
        self.logged, self.axes, self.summary, self.ended = [], {}, {}, None

    def init(self, **about):
        self.about = about
        return self

    def define_metric(self, name, step_metric=None, hidden=False):
        self.axes[name] = step_metric

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", library := Wandb())
    return library


def test_each_stage_has_a_step_axis(tmp_path, wandb):
    logger = WandbLogger(project="p")
    logger.scalars("before", 0, {"loss": 1})  # outside of a run nothing happens
    with logger.run(tmp_path, {"eta": 1}):
        for stage in ("embedding", "tuning"):
            logger.scalars(stage, 7, {"loss": 0.5})
    assert wandb.axes["tuning/*"] == "tuning/step" and wandb.axes["embedding/*"] == "embedding/step"
    assert wandb.logged[1] == {"tuning/loss": 0.5, "tuning/step": 7} and len(wandb.logged) == 2
    assert wandb.about["mode"] == "offline" and wandb.about["dir"] == tmp_path and wandb.ended == 0
    with pytest.raises(ValueError), logger.run(tmp_path, {}):
        raise ValueError
    assert wandb.ended == 1


def test_the_report_is_logged_as_tables_pictures_and_means(tmp_path, wandb):
    for name in ("a.png", "b.png", "sheet.png"):
        Image.new("RGB", (600, 300)).save(tmp_path / name)
    row = {"task": "t", "method": "m", "prompt": "p", "input": "a.png"}
    rows = [row | {"psnr": n, "file": file} for n, file in ((1.0, "a.png"), (2.0, "b.png"))]
    rows.append({"task": "u", "error": "broken"})
    logger = WandbLogger()
    with logger.run(tmp_path, {}):
        logger.report(tmp_path, rows)
    results = wandb.logged[0]["results"]
    assert len(results) == 3 and results["file"][1][1].size == (256, 128) and results["file"][2] is None
    assert results["input"][0] is results["input"][1]  # a picture is in memory once
    assert "sheet" in wandb.logged[1] and wandb.summary["psnr"] == 1.5 and wandb.summary["failed"] == 1


@pytest.mark.parametrize("given", [{}, {"WANDB_MODE": "dryrun", "WANDB_DIR": "/x", "WANDB_SILENT": "false"}])
def test_the_variables_of_wandb_win(tmp_path, wandb, monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    node = OmegaConf.load(CLONE / "conf" / "logger" / "wandb.yaml")
    with build({"logger": OmegaConf.to_container(node, resolve=True)}, "logger").run(tmp_path, {}):
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "wandb")  # where tables wait for an upload
    assert "WANDB_DATA_DIR" not in os.environ
    assert wandb.about["mode"] == "offline" and wandb.about["project"] == "palimpsest"
    assert wandb.about["tags"] is wandb.about["entity"] is None  # so W&B reads its own variables
    assert str(wandb.about["dir"]) == given.get("WANDB_DIR", str(tmp_path))
    assert hasattr(wandb.about["settings"], "silent") == ("WANDB_SILENT" not in given)
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
    with pytest.raises(InputError, match=r"logger\.mode"):
        WandbLogger("on")
