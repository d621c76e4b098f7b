"""Weights & Biases, offline unless asked otherwise. `mode=disabled` never imports it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from errors import InputError
from reporting.tables import unique

TABLE_SIDE = 256
MODES = ("online", "offline", "disabled")


class WandbLogger:
    """One W&B run for each job, with its files in the job's own folder."""

    def __init__(
        self,
        mode: str = "offline",
        project: str = "palimpsest",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
    ):
        if mode not in MODES:
            raise InputError(f"logger.mode={mode} is unknown: choose from {', '.join(MODES)}")
        self.mode = mode
        self.about = dict(project=project, entity=entity, name=name, group=group, tags=list(tags))
        self.active = None

    @contextmanager
    def run(self, folder: Path, config: dict) -> Iterator[None]:
        """Inside, what is logged goes to a run that is configured by `config` and kept in `folder`/wandb."""
        if self.mode == "disabled":
            yield
            return
        import wandb

        quiet = wandb.Settings(silent=True, console="off", x_disable_stats=self.mode == "offline")
        try:
            self.active = wandb.init(
                mode=self.mode, dir=folder, config=config, settings=quiet, reinit="finish_previous",
                **self.about,
            )  # fmt: skip
        except wandb.errors.Error as error:
            told = " ".join(str(error).split())
            raise InputError(f"W&B could not start: {told} (logger.mode=offline needs no account)") from error
        self.steps_of = set()
        code = 1
        try:
            yield
            code = 0
        finally:
            self.active.finish(exit_code=code)
            self.active = None

    def scalars(self, stage: str, step: int, values: dict[str, float]) -> None:
        """One point of a stage's curves, each stage with a step axis of its own."""
        if self.active is None:
            return
        if stage not in self.steps_of:
            self.steps_of.add(stage)
            self.active.define_metric(f"{stage}/step", hidden=True)
            self.active.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        point = {f"{stage}/{name}": value for name, value in values.items()}
        self.active.log(point | {f"{stage}/step": step})

    def pictures(self, pictures: dict[str, Image.Image | Path | list[tuple[Image.Image, str]]]) -> None:
        """Pictures, files of pictures, or lists of (picture, caption), by name."""
        if self.active is None:
            return
        import wandb

        def wrap(value):
            if isinstance(value, list):
                return [wandb.Image(picture, caption=caption) for picture, caption in value]
            return wandb.Image(os.fspath(value) if isinstance(value, Path) else value)

        self.active.log({name: wrap(value) for name, value in pictures.items()})

    def table(self, name: str, rows: Sequence[dict]) -> None:
        """A table with a column for each key; paths are pictures, shown at most `TABLE_SIDE` pixels wide or high."""
        if self.active is None or not rows:
            return
        import wandb

        columns = unique(key for row in rows for key in row)
        cells = [[row.get(key) for key in columns] for row in rows]
        pictures = {}  # W&B keeps them in memory until the run ends: each file once
        for path in (cell for line in cells for cell in line if isinstance(cell, Path)):
            if path not in pictures:
                picture = Image.open(path).convert("RGB")
                picture.thumbnail((TABLE_SIDE, TABLE_SIDE))
                pictures[path] = wandb.Image(picture)
        shown = [[pictures[c] if isinstance(c, Path) else c for c in line] for line in cells]
        self.active.log({name: wandb.Table(columns=columns, data=shown, allow_mixed_types=True)})

    def summary(self, numbers: dict[str, float | str]) -> None:
        """Final numbers of the run."""
        if self.active is not None:
            self.active.summary.update(numbers)
