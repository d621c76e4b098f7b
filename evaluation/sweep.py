"""The two ends of a sweep: the check of its objective, and the report on all jobs in its folder.

Everything is read from the jobs' own folders, so that any launcher may have run them.
"""

import sys
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

LESS_IS_BETTER = (
    "mse", "lpips", "structure_distance", "latent_distance", "change_error", "seconds", "evaluations", "peak_memory_gb",
)  # fmt: skip


class Summary(Callback):
    """Hydra's callback for `--multirun`. Exits with 1 if a job failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        """Exit unless a sweeper that optimises moves each metric to where it is better. Optuna minimises by default."""
        given = OmegaConf.select(config, "hydra.sweeper.direction"), config.objective or []
        directions, names = ([*each] if isinstance(each, list | ListConfig) else [each] for each in given)
        best = ["minimize" if name.startswith(LESS_IS_BETTER) else "maximize" for name in names]
        if directions != [None] and ([getattr(each, "name", each) for each in directions] != best or not names):
            sys.exit(f"error: this sweeper needs objective=METRIC, and hydra.sweeper.direction={best} for it")

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        from evaluation import report

        folder = Path(config.hydra.sweep.dir)
        rows = report.read(folder)
        failed = rows[rows["error"].notna() & rows["task"].isna()]["job"].nunique()
        print(f"{report.write(folder, rows, rows['task'].nunique())}\n{rows['job'].nunique()} jobs, {failed} failed")
        if failed:
            sys.exit(1)
