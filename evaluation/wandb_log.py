"""Weights & Biases: one run for each job, offline unless asked otherwise. `mode=disabled` never imports it."""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from data.images import open_rgb
from errors import InputError
from evaluation.cli import overrides


class WandbLogger:
    """Outside of `run`, and in mode disabled, nothing is logged. `about` goes to wandb.init: project, name, tags. W&B's
    own variables win over the defaults in conf/logger and in `run`."""

    def __init__(self, mode: str = "offline", **about):
        mode = {"run": "online", "dryrun": "offline"}.get(str(mode), mode)  # as WANDB_MODE may have it
        if mode not in ("online", "offline", "disabled"):
            raise InputError(f"logger.mode={mode} is unknown: choose from online, offline, disabled")
        about |= {"tags": [about["tags"]]} if isinstance(about.get("tags"), str) else {}
        self.mode, self.about, self.active = mode, about, None

    @contextmanager
    def run(self, folder: Path, config: dict, method: str = "", subject: str = "") -> Iterator[None]:
        """Inside, a W&B run with this config is active, named after what it does: "imagic, eta 0.4: a sitting dog". The
        jobs of a sweep are a group. All files are in `folder`/wandb. Raises InputError where W&B cannot start."""
        if self.mode == "disabled":
            yield
            return
        import wandb

        from evaluation import report

        quiet = {"silent": True, "console": "off", "init_timeout": 10, "x_disable_stats": self.mode == "offline"}
        quiet = {name: value for name, value in quiet.items() if f"WANDB_{name.upper()}" not in os.environ}
        about = dict(mode=self.mode, dir=os.environ.get("WANDB_DIR", folder), config=config, reinit="finish_previous")
        typed = {name: v for name, v in overrides().items() if re.match(r"seed$|(method|sampler|inversion)\.", name)}
        about["name"] = f"{', '.join(filter(None, [method, report.describe(typed, typed)]))}: {subject}"[:128]
        hydra = HydraConfig.get() if HydraConfig.initialized() else None
        about["group"] = hydra.sweep.dir[-128:] if hydra and hydra.mode == RunMode.MULTIRUN else None
        about |= {name: value for name, value in self.about.items() if value is not None}
        data = os.environ.get("WANDB_DATA_DIR")
        os.environ["WANDB_DATA_DIR"] = data or str(folder / "wandb")  # where a table waits for its upload
        try:
            self.active = wandb.init(**about, settings=wandb.Settings(**quiet))
        except (wandb.errors.Error, TypeError, ValueError) as error:  # the last two of a setting
            line = " ".join(str(error).split())
            raise InputError(f"W&B could not start: {line} (logger.mode=offline needs no account)") from error
        self.stages, code = set(), 1
        try:
            yield
            code = 0
        finally:
            self.active.finish(exit_code=code)
            self.active = None
            if data is None:
                del os.environ["WANDB_DATA_DIR"]

    def scalars(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Add a point to the curves of a stage, which have a step axis of their own."""
        if self.active is None:
            return
        if stage not in self.stages:
            self.stages.add(stage)
            self.active.define_metric(f"{stage}/step", hidden=True)
            self.active.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.active.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def report(self, folder: Path, rows: Sequence[dict]) -> None:
        """Log a run in `folder`: a table with the pictures of each edit, the sheet, plots, and means as the summary."""
        if self.active is None or not rows:
            return
        import pandas as pd
        import wandb

        from evaluation import report

        @functools.cache  # W&B keeps pictures in memory until the run ends: each file once
        def small(name: str) -> wandb.Image:
            picture = open_rgb(folder / name)
            picture.thumbnail((256, 256))
            return wandb.Image(picture)

        table = report.complete(pd.DataFrame(rows)).replace("", None).dropna(axis="columns", how="all").astype(object)
        table = table.where(table.notna(), None)
        for column in table.columns.intersection([*report.FILES]):
            table[column] = [small(file) if file else None for file in table[column]]
        table = table.drop(columns="pictures", errors="ignore").rename(columns={"file": "edit"})
        self.active.log({"results": wandb.Table(dataframe=table, allow_mixed_types=True)})
        files = [folder / "sheet.png", *folder.glob("plots/*.png")]
        self.active.log({file.stem: wandb.Image(str(file)) for file in files if file.exists()})
        lines = report.records(report.means(report.labelled(pd.DataFrame(rows)), ["label"]))
        for line in lines:
            label = f"{line.pop('label')}/" if len(lines) > 1 else ""
            self.active.summary.update({label + name: value for name, value in line.items() if name != "label"})
