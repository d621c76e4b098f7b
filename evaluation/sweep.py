"""The two ends of a sweep: the check of its objective, and the report on all jobs in its folder.

Everything is read from the jobs' own folders, so that any launcher may have run them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

LESS_IS_BETTER = (
    "mse", "lpips", "structure_distance", "latent_distance", "change_error", "seconds", "evaluations", "peak_memory_gb",
)  # fmt: skip


def check_directions(names: Sequence[str], directions: Sequence[str]) -> None:
    """Exit unless a sweeper moves each metric to where it is better. Optuna minimises by default."""
    best = ["minimize" if name.startswith(LESS_IS_BETTER) else "maximize" for name in names]
    if not names:
        sys.exit("error: this sweeper needs something to optimise, for example objective=success")
    if list(directions) != best:
        sys.exit(f"error: objective={','.join(names)} needs hydra.sweeper.direction=[{','.join(best)}]")


class Summary(Callback):
    """Hydra's callback for `--multirun`. Exits with 1 if a job failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        if directions := OmegaConf.select(config, "hydra.sweeper.direction"):  # else this sweeper optimises nothing
            given = (config.objective or [], directions)
            names, directions = (each if isinstance(each, list | ListConfig) else [each] for each in given)
            check_directions(names, [getattr(each, "name", each) for each in directions])

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        from evaluation import report

        folder = Path(config.hydra.sweep.dir)
        rows = report.read(folder)
        failed = rows[rows["error"].notna() & rows["task"].isna()]["job"].nunique()
        print(f"{report.write(folder, rows, rows['task'].nunique())}\n{rows['job'].nunique()} jobs, {failed} failed")
        if failed:
            sys.exit(1)
