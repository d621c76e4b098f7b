"""Sweeps: the presets in conf/experiment, what a run hands to a sweeper that optimises, and Hydra's launchers and
sweepers as a user runs them."""

# ruff: noqa: F811 (`user` is a fixture of theirs)

import csv
import itertools
import json
import re
import shlex
from pathlib import Path

import hydra
import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf
from test_edit_cli import PHOTO, SHORT, edit, run_here, user  # noqa: F401

from errors import InputError
from reporting import objective
from reporting.sweep import Summary, read_jobs

CONF = Path(__file__).resolve().parent.parent / "conf"
ABLATIONS = {"imagic_eta": 1, "imagic_no_tuning": 2, "direct_inversion_steps": 16, "direct_inversion_guidance": 25}
SEARCHES = ("optuna_success", "optuna_tradeoff")
QUIET = [*PHOTO, *SHORT, "logger.mode=disabled"]


@pytest.fixture
def composed():
    """`edit.py`'s settings for the given arguments, Hydra's own too."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *arguments: hydra.compose("edit", list(arguments), return_hydra_config=True)


# Presets.


def test_every_preset_is_tested():
    assert {file.stem for file in (CONF / "experiment").glob("*.yaml")} == {*ABLATIONS, *SEARCHES}


@pytest.mark.parametrize("model", ["openmoji64", "sd15"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_runs_methods_that_can_be_made(composed, name, model):
    preset = [f"+experiment={name}", f"model={model}"]
    cfg = composed(*preset)
    params = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)
    assert len(jobs) == ABLATIONS[name]
    for job in (jobs[0], jobs[-1]):
        method = instantiate(composed(*preset, *job).method)
        assert type(method).__name__ == ("Imagic" if "imagic" in name else "DirectInversion")


def test_without_tuning_the_network_stays_as_it_is_and_with_it_the_models_own_steps_are_taken(composed):
    for model, steps in (("openmoji64", 120), ("sd15", 1500)):
        params = composed("+experiment=imagic_no_tuning", f"model={model}").hydra.sweeper.params
        assert params["method.tuning_steps"] == f"0,{steps}"


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_leads_each_metric_to_where_it_is_better(composed, name):
    pytest.importorskip("optuna")
    cfg = composed(f"+experiment={name}")
    Summary().on_multirun_start(cfg)  # ends the program otherwise
    for key in cfg.hydra.sweeper.params:
        assert OmegaConf.select(cfg, key) is not None
    assert composed(f"+experiment={name}", "task=folder").hydra.runtime.choices.task == "folder"  # what one says wins


def test_a_search_for_another_method_as_the_preset_says(composed):
    pytest.importorskip("optuna")
    command = re.search("python edit.py -m (.*)", (CONF / "experiment" / "optuna_success.yaml").read_text())[1]
    *settings, search = shlex.split(command)
    cfg = composed(*settings)
    (override,) = OverridesParser.create().parse_overrides([search])
    assert cfg.hydra.sweeper.params is None and override.is_interval_sweep()
    assert OmegaConf.select(cfg, override.key_or_group) is not None


# The objective.


def rows(*metrics, failed=0):
    made = [{"task": f"t{i}", "metrics": m, "left_out": {"lpips": "no weights"}} for i, m in enumerate(metrics)]
    return made + [{"task": f"f{i}", "error": "no"} for i in range(failed)]


def test_the_objective_is_the_mean_over_all_edits():
    made = rows({"success": 1.0, "psnr": 20.0}, {"success": 0.0, "psnr": 30.0}, {"success": 1.0})
    assert objective.value(["success"], made) == pytest.approx(2 / 3)
    assert objective.value(["success", "psnr"], made) == [pytest.approx(2 / 3), 25.0]
    assert objective.value([], made) is None


def test_an_objective_that_cannot_be_had_is_one_line():
    with pytest.raises(InputError, match="1 of 3 tasks failed"):
        objective.value(["success"], rows({"success": 1.0}, {"success": 1.0}, failed=1))
    with pytest.raises(InputError, match="objective=lpips cannot be computed: no weights"):
        objective.value(["lpips"], rows({"success": 1.0}))
    with pytest.raises(InputError, match=r"sucess is unknown: choose from .*seconds, success"):
        objective.check(["sucess"], {"success": 1.0}, {})
    with pytest.raises(InputError, match="cannot be computed: no truth"):
        objective.check(["psnr", "success"], {"psnr": 1.0}, {"success": "no truth"})
    objective.check(["psnr", "seconds"], {"psnr": 1.0}, {})
    for wrong in (3, [], ["success", 2], "", {"success": 1}):
        with pytest.raises(InputError, match=r"^objective="):
            objective.names(wrong)


@pytest.mark.parametrize("names", [*itertools.permutations(("success", "psnr_to_input_kept", "seconds"), 2)])
def test_a_search_in_the_wrong_direction_is_refused(names):
    right = ["minimize" if name == "seconds" else "maximize" for name in names]
    objective.check_directions(names, right)
    for given in itertools.product(("maximize", "minimize"), repeat=2):
        if list(given) != right:
            with pytest.raises(InputError, match=rf"direction=\[{right[0]},{right[1]}\]"):
                objective.check_directions(names, given)


def test_a_sweeper_that_optimises_must_know_what(capsys):
    config = {"objective": None, "hydra": {"sweep": {"dir": "nowhere"}, "sweeper": {"direction": "maximize"}}}
    with pytest.raises(SystemExit, match=r"error: .* objective=success"):
        Summary().on_multirun_start(OmegaConf.create(config))
    config["objective"] = "success"
    Summary().on_multirun_start(OmegaConf.create(config))
    del config["hydra"]["sweeper"]["direction"], config["objective"]
    Summary().on_multirun_start(OmegaConf.create(config))


def test_a_run_returns_its_objective(user, tmp_path):
    wanted = "objective=[psnr_to_input,reconstruction_psnr]"
    returned = run_here(user, tmp_path / "one", *QUIET, "method.eta=[0.4,0.8]", wanted)
    report = json.loads((tmp_path / "one" / "metrics.json").read_text())
    likeness = [e["metrics"]["psnr_to_input"] for e in report["edits"]]
    assert returned == [pytest.approx(sum(likeness) / 2), report["reconstruction"]["psnr"]]
    assert run_here(user, tmp_path / "one", *QUIET) is None

    lines = [{"image": "photo.jpg", "prompt": prompt, "truth": "photo.jpg"} for prompt in ("a red heart", "a cat")]
    lines[0].pop("truth")  # which the other has
    (user / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    many = [*(setting for setting in QUIET if setting not in PHOTO), "task=folder", "task.path=list.jsonl"]
    returned = run_here(user, tmp_path / "many", *many, "objective=psnr_to_truth")
    with open(tmp_path / "many" / "results.csv", encoding="utf-8") as file:
        likeness = [row["psnr_to_truth"] for row in csv.DictReader(file)]
    assert likeness[0] == "" and returned == pytest.approx(float(likeness[1]))

    for setting, part in (("success", "the task has no source prompt"), ("sucess", "is unknown: choose from")):
        with pytest.raises(InputError, match=f"objective={setting} .*{part}"):
            run_here(user, tmp_path / "wrong", *many, f"objective={setting}")
    assert not (tmp_path / "wrong").exists()  # nothing was begun


# Launchers and sweepers.


@pytest.mark.slow
def test_a_search_by_jobs_side_by_side_that_share_one_tuning(user):
    """Optuna asks for two eta at once, so that two processes want the same two stages: each is tuned by one of them,
    and the edits are those of a run by itself."""
    pytest.importorskip("joblib")
    pytest.importorskip("optuna")
    settings = [*QUIET, "hydra.sweep.dir=searched", f"cache.dir={user / 'shared'}", "hydra/sweeper=optuna"]
    settings += ["hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize", "objective=psnr_to_input"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    code, out, err = edit(user, *settings, *launcher, "--multirun", "method.eta=interval(0.0,1.0)")
    assert code == 0 and "2 jobs, 0 failed" in out, err
    jobs = read_jobs(user / "searched")
    reused = [json.loads((row.picture.parents[1] / "timings.json").read_text())["reused_tuning"] for row in jobs]
    assert sorted(itertools.chain(*reused)) == ["embedding", "tuning"]
    assert len(list((user / "shared").glob("*.safetensors"))) == 2
    found = yaml.safe_load((user / "searched" / "optimization_results.yaml").read_text())
    best = max(jobs, key=lambda row: row.numbers["psnr_to_input"])
    assert found["best_value"] == pytest.approx(best.numbers["psnr_to_input"])
    assert found["best_params"]["method.eta"] == pytest.approx(best.settings["eta"])
    alone = [*QUIET, "cache.enabled=false", f"method.eta={best.overrides['method.eta']}"]
    run_here(user, user / "alone", *alone)
    (edited,) = (user / "alone" / "edits").iterdir()
    assert edited.read_bytes() == best.picture.read_bytes()


@pytest.mark.slow
def test_a_job_of_submitit_runs_wherever_one_stands(user):
    """As on a cluster: a process of its own, started from a file, and not by `edit.py`, whose folder it must find."""
    pytest.importorskip("submitit")
    settings = [*QUIET, "hydra/launcher=submitit_local", "hydra.sweep.dir=submitted"]
    code, out, err = edit(user, *settings, "--multirun", "method.eta=0.4")
    assert code == 0 and "1 jobs, 0 failed" in out, err
    (done,) = read_jobs(user / "submitted")
    assert done.picture.exists() and done.overrides["method.eta"] == "0.4"


def test_a_search_for_nothing_is_one_line(user):
    pytest.importorskip("optuna")
    code, out, err = edit(user, *QUIET, "hydra/sweeper=optuna", "--multirun", "method.eta=interval(0.0,1.0)")
    assert (code, out) == (1, "") and err == [
        "error: this sweeper needs to know what to optimise, for example objective=success"
    ]
