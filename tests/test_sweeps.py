"""Sweeps: the presets in conf/experiment, the check of an objective, the report at the end, launchers and sweepers."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
import pandas as pd
import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

import edit  # noqa: F401 (which makes the methods choices of Hydra's)
import models
from errors import InputError
from evaluation import report
from evaluation.sweep import Summary, check_directions
from tests.test_report import edit as row
from tests.test_report import write_job

CLONE = Path(__file__).resolve().parent.parent
EXPERIMENTS = CLONE / "conf" / "experiment"
ABLATIONS = {"imagic_eta": 1, "imagic_no_tuning": 2, "direct_inversion_steps": 16, "direct_inversion_guidance": 25}
SEARCHES = ("optuna_success", "optuna_tradeoff")


@pytest.fixture
def composed():
    """`edit.py`'s settings for the given arguments, with Hydra's own."""
    with hydra.initialize_config_dir(str(CLONE / "conf"), version_base="1.3"):
        yield lambda *arguments: hydra.compose("edit", list(arguments), return_hydra_config=True)


# Presets.


def test_every_preset_is_tested():
    assert {file.stem for file in EXPERIMENTS.glob("*.yaml")} == {*ABLATIONS, *SEARCHES, "openmoji64_gpu"}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_runs_methods_that_can_be_made(composed, name):
    cfg = composed(f"+experiment={name}", "model=sd15")
    params = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)
    assert len(jobs) == ABLATIONS[name]
    for job in (jobs[0], jobs[-1]):
        method = instantiate(composed(f"+experiment={name}", "model=sd15", *job).method, _convert_="all")
        assert type(method).__name__ == ("Imagic" if "imagic" in name else "DirectInversion")


def test_the_tuned_network_of_an_ablation_takes_the_steps_of_its_model(composed):
    for model, steps in (("openmoji64", 120), ("sd15", 1500)):
        params = composed("+experiment=imagic_no_tuning", f"model={model}").hydra.sweeper.params
        assert params["method.tuning_steps"] == f"0,{steps}"


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_varies_settings_that_exist_in_the_right_direction(composed, name):
    pytest.importorskip("optuna")
    cfg = composed(f"+experiment={name}")
    Summary().on_multirun_start(cfg)  # exits for a wrong direction
    assert all(OmegaConf.select(cfg, key) is not None for key in cfg.hydra.sweeper.params)


def test_a_search_for_another_method_as_the_preset_says(composed):
    pytest.importorskip("optuna")
    command = re.search("python edit.py -m (.*)", (EXPERIMENTS / "optuna_success.yaml").read_text())[1]
    *settings, search = shlex.split(command)
    cfg = composed(*settings)
    (override,) = OverridesParser.create().parse_overrides([search])
    assert cfg.hydra.sweeper.params is None and override.is_interval_sweep()
    assert OmegaConf.select(cfg, override.key_or_group) is not None


# The objective's direction.


@pytest.mark.parametrize("names", itertools.permutations(("success", "psnr_to_input_kept", "seconds"), 2))
def test_a_search_in_the_wrong_direction_is_refused(names):
    right = ["minimize" if name == "seconds" else "maximize" for name in names]
    check_directions(names, right)
    for given in itertools.product(("maximize", "minimize"), repeat=2):
        if list(given) != right:
            with pytest.raises(InputError, match="direction"):
                check_directions(names, given)


def test_a_sweeper_that_optimises_needs_an_objective():
    config = {"objective": None, "hydra": {"sweep": {"dir": "nowhere"}, "sweeper": {"direction": "maximize"}}}
    with pytest.raises(SystemExit, match="objective"):
        Summary().on_multirun_start(OmegaConf.create(config))
    Summary().on_multirun_start(OmegaConf.create(config | {"objective": "success"}))
    del config["hydra"]["sweeper"]
    Summary().on_multirun_start(OmegaConf.create(config))


# The end of a sweep.


def test_the_end_reports_on_all_jobs_but_older_ones_and_exits_with_1_after_a_failure(tmp_path, capsys):
    config = OmegaConf.create({"objective": None, "hydra": {"sweep": {"dir": str(tmp_path)}}})
    for number in range(3):
        write_job(tmp_path, number, {"method.eta": "0.1"}, [row("edit")])
    summary = Summary()
    summary.on_multirun_start(config)
    again = tmp_path / "1" / ".hydra" / "overrides.yaml"
    os.utime(again, (1, 1))  # begun anew, by a machine whose clock is wrong
    write_job(tmp_path, 3, {"method.eta": "0.4"}, [row("edit")])
    summary.on_multirun_end(config)
    assert pd.read_csv(tmp_path / "results.csv")["job"].tolist() == [1, 3]
    assert (tmp_path / "sheet.png").exists() and "imagic, eta 0.4" in (tmp_path / "comparison.md").read_text()
    assert "2 jobs, 0 failed" in capsys.readouterr().out
    write_job(tmp_path, 4, {"method.eta": "0.5"}, [])
    with pytest.raises(SystemExit) as end:
        summary.on_multirun_end(config)
    assert end.value.code == 1 and "3 jobs, 1 failed" in capsys.readouterr().out


@pytest.fixture(scope="module")
def user(tmp_path_factory, tiny_model):
    """A folder of a user's with a tiny checkpoint and a photo, away from the clone."""
    folder = tmp_path_factory.mktemp("user")
    models.save(tiny_model, folder / "tiny")
    Image.effect_noise((90, 60), 60).convert("RGB").save(folder / "photo.jpg")
    return folder


def run(user, *settings):
    """Run a sweep of `edit.py`; returns the process."""
    short = ["sampler.steps=3", "method.embedding_steps=3", "method.tuning_steps=2", "logger.mode=disabled"]
    about = ["model.weights=tiny", "image=photo.jpg", "prompt=a red heart", f"cache.dir={user / 'cache'}"]
    command = [sys.executable, str(CLONE / "edit.py"), "--multirun", *about, *short, *settings]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HYDRA", "PALIMPSEST"))}
    return subprocess.run(command, cwd=user, env=clean | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_a_sweep_survives_a_job_that_fails(user):
    done = run(user, "hydra.sweep.dir=swept", "method.eta=0.4,-1")
    assert done.returncode == 1 and "2 jobs, 1 failed" in done.stdout, done.stderr
    first, second = report.read(user / "swept").to_dict("records")
    assert first["method.eta"] == "0.4" and (user / "swept" / first["file"]).exists()
    assert second["method.eta"] == "-1" and "eta" in second["error"]


@pytest.mark.slow
def test_jobs_of_a_search_side_by_side_share_one_tuning(user):
    """Optuna asks for two eta at once, and both processes want the same stages: each stage is tuned by one of them."""
    pytest.importorskip("joblib")
    pytest.importorskip("optuna")
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=searched"]
    done = run(user, *search, *launcher, "objective=psnr_to_input", "method.eta=interval(0.0,1.0)")
    assert done.returncode == 0 and "2 jobs, 0 failed" in done.stdout, done.stderr
    rows = report.read(user / "searched")
    found = yaml.safe_load((user / "searched" / "optimization_results.yaml").read_text())
    assert found["best_value"] == pytest.approx(rows["psnr_to_input"].max())
    assert found["best_params"]["method.eta"] == pytest.approx(rows["edit.eta"][rows["psnr_to_input"].idxmax()])
    assert rows["embedding_loss"].nunique() == rows["tuning_loss"].nunique() == 1


@pytest.mark.slow
def test_a_job_of_submitit_finds_the_clone(user):
    """As on a cluster: a process of its own, started from a file and not by `edit.py`."""
    pytest.importorskip("submitit")
    done = run(user, "hydra/launcher=submitit_local", "hydra.sweep.dir=submitted", "method.eta=0.4")
    assert done.returncode == 0 and "1 jobs, 0 failed" in done.stdout, done.stderr
    (row,) = report.read(user / "submitted").to_dict("records")
    assert json.loads((user / "submitted" / row["job"] / "rows.jsonl").read_text())["method.eta"] == "0.4"
