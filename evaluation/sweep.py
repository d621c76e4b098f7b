"""The two ends of a sweep: the check of its objective, and the report on all jobs in its folder.

Everything is read from the jobs' own folders, so that any launcher may have run them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from errors import InputError

LESS_IS_BETTER = (
    "mse", "lpips", "structure_distance", "latent_distance", "change_error", "seconds", "evaluations", "peak_memory_gb",
)  # fmt: skip


def check_directions(names: Sequence[str], directions: Sequence[str]) -> None:
    """Raise InputError unless a sweeper moves each metric to where it is better. Optuna minimises by default."""
    if not names:
        raise InputError("this sweeper needs something to optimise, for example objective=success")
    best = ["minimize" if name.startswith(LESS_IS_BETTER) else "maximize" for name in names]
    if list(directions) != best:
        raise InputError(f"objective={','.join(names)} needs hydra.sweeper.direction=[{','.join(best)}]")


class Summary(Callback):
    """Hydra's callback for `--multirun`. Exits with 1 if a job failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        directions = OmegaConf.select(config, "hydra.sweeper.direction")
        if directions is None:  # this sweeper optimises nothing
            return
        from evaluation.runner import names  # not above: --help would wait for torch

        directions = directions if isinstance(directions, ListConfig) else [directions]
        try:
            check_directions(names(config.objective), [getattr(each, "name", each) for each in directions])
        except InputError as error:  # Hydra would only log it
            sys.exit(f"error: {error}")

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        from evaluation import report

        folder = Path(config.hydra.sweep.dir)
        rows = report.read(folder)
        failed = rows[rows["error"].notna() & rows["task"].isna()]["job"].nunique()
        print(f"{report.write(folder, rows, rows['task'].nunique())}\n{rows['job'].nunique()} jobs, {failed} failed")
        if failed:
            sys.exit(1)
