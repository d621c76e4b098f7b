"""Sweeps: the presets in conf/experiment, the check of an objective, the report at the end, launchers and sweepers."""

# ruff: noqa: F811 (the fixture `user`)

import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from evaluation import report
from evaluation.cli import Summary
from tests.conftest import compose
from tests.test_edit_cli import PHOTO, SHORT, user  # noqa: F401
from tests.test_edit_cli import edit as command

ABLATIONS = {"imagic_eta": 1, "imagic_no_tuning": 2, "direct_inversion_steps": 16, "direct_inversion_guidance": 25}


# Presets.


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_runs_methods_that_can_be_made(name):
    cfg = compose("edit", f"+experiment={name}", "model=sd15", return_hydra_config=True)
    params = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)
    assert len(jobs) == ABLATIONS[name]
    for job in (jobs[0], jobs[-1]):
        method = instantiate(compose("edit", f"+experiment={name}", "model=sd15", *job).method, _convert_="all")
        assert type(method).__name__ == ("Imagic" if "imagic" in name else "DirectInversion")


@pytest.mark.parametrize("name", ["optuna_success", "optuna_tradeoff"])
def test_a_search_varies_settings_that_exist_in_the_right_direction(name):
    pytest.importorskip("optuna")
    cfg = compose("edit", f"+experiment={name}", return_hydra_config=True)
    Summary().on_multirun_start(cfg)  # exits for a wrong direction
    assert all(OmegaConf.select(cfg, key) is not None for key in cfg.hydra.sweeper.params)


# The objective.


def test_a_search_in_the_wrong_direction_and_jobs_in_one_folder_are_refused():
    def check(names, directions, subdir="job/${hydra.job.num}"):
        node = {"objective": names, "hydra": {"sweeper": {"direction": directions}, "sweep": {"subdir": subdir}}}
        Summary().on_multirun_start(OmegaConf.create(node))

    check(["success", "seconds"], ["maximize", "minimize"])
    check("success", "maximize")
    check(None, None)  # a sweeper that optimises nothing
    for names, wrong in (([], "maximize"), ("mse_to_input", "maximize"), (["success", "seconds"], ["maximize"] * 2)):
        with pytest.raises(SystemExit, match="direction"):
            check(names, wrong)
    with pytest.raises(SystemExit, match="subdir"):
        check(None, None, "all")


# The end of a sweep.


def run(user, *settings):
    return command(user, "--multirun", *SHORT, *PHOTO, "logger.mode=disabled", *settings)


def test_a_sweep_survives_a_job_that_fails(user):
    code, out, err = run(user, "hydra.sweep.dir=swept", "method.eta=0.4,-1")
    assert code == 1 and "2 jobs, 1 failed" in out, err
    assert "imagic, eta 0.4" in (user / "swept" / "table.md").read_text()
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
    code, out, err = run(user, *search, *launcher, "objective=psnr_to_input", "method.eta=interval(0.0,1.0)")
    assert code == 0 and "2 jobs, 0 failed" in out, err
    rows = report.read(user / "searched")
    found = yaml.safe_load((user / "searched" / "optimization_results.yaml").read_text())
    assert found["best_value"] == pytest.approx(rows["psnr_to_input"].max())
    assert found["best_params"]["method.eta"] == pytest.approx(rows["edit.eta"][rows["psnr_to_input"].idxmax()])
    assert rows["embedding_loss"].nunique() == rows["tuning_loss"].nunique() == 1
