"""What a sweeper is to optimise: the means of the metrics that `objective` names, which `edit.py` returns to Hydra.

A benchmark's headline is `success`; `objective=[success,psnr_to_input_kept]` weighs it against preservation. See
conf/experiment/optuna_success.yaml and optuna_tradeoff.yaml.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from errors import InputError
from reporting.tables import means, never_measured

OF_A_RUN = ("reconstruction_psnr", "seconds", "evaluations", "peak_memory_gb")  # what `benchmark.rows_of` adds
LESS_IS_BETTER = (
    "mse", "lpips", "structure_distance", "latent_distance", "seconds", "evaluations", "peak_memory_gb",
)  # fmt: skip


def names(objective: str | Sequence[str] | None) -> list[str]:
    """The metrics that are named; none for null. Raises InputError for what is no name."""
    if objective is None:
        return []
    given = [objective] if isinstance(objective, str) or not isinstance(objective, Sequence) else list(objective)
    if not given or not all(isinstance(name, str) and name for name in given):
        raise InputError(f"objective={objective}: the name of a metric, or a list such as [success,psnr_to_input_kept]")
    return given


def example(task, entries: Sequence):
    """`task`, the first, with what any of the `entries` has, if only to ask which metrics can be had."""
    import torch  # not above: `--help` comes by here

    mask = torch.eye(*task.image.shape[2:])[None, None]
    parts = {"source_prompt": " ", "mask": mask, "truth": task.image}
    has = [name for name in parts if getattr(task, name) not in (None, "") or any(getattr(e, name) for e in entries)]
    return replace(task, **{name: parts[name] for name in has})


def check(wanted: Sequence[str], measured: Mapping[str, float], left_out: Mapping[str, str]) -> None:
    """Raise InputError for a metric that does not exist, and for one that cannot be had. `measured` and `left_out` are
    what `Metrics.measure` makes of any picture of the `example`: so nobody waits for a mistake to show."""
    known = {*measured, *left_out, *OF_A_RUN}
    for name in wanted:
        if name not in known:
            raise InputError(f"objective={name} is unknown: choose from {', '.join(sorted(known))}")
        if name in left_out:
            raise InputError(f"objective={name} cannot be computed: {left_out[name]}")


def value(wanted: Sequence[str], rows: Sequence[dict]) -> float | list[float] | None:
    """The mean over the edits of a run, `rows` as `benchmark.rows_of` makes them: a number for one metric, a list for
    several, None for none. Raises InputError where tasks failed, since a mean over the rest, the easy ones perhaps,
    would not compare with those of other settings."""
    if not wanted:
        return None
    failed = {row["task"] for row in rows if "error" in row}
    if failed:
        raise InputError(
            f"objective: {len(failed)} of {len({row['task'] for row in rows})} tasks failed, so the rest does not "
            "compare with other settings"
        )
    mean, why = means(rows), never_measured(rows)
    for name in wanted:
        if name not in mean:
            raise InputError(f"objective={name} cannot be computed: {why.get(name, 'no edit has it')}")
    values = [mean[name] for name in wanted]
    return values if len(values) > 1 else values[0]


def check_directions(wanted: Sequence[str], directions: Sequence[str]) -> None:
    """Raise InputError unless a sweeper that optimises leads each metric to where it is better; Hydra's would minimise
    if nobody said otherwise."""
    if not wanted:
        raise InputError("this sweeper needs to know what to optimise, for example objective=success")
    best = ["minimize" if name.startswith(LESS_IS_BETTER) else "maximize" for name in wanted]
    if list(directions) != best:
        shown = [item[0] if len(item) == 1 else f"[{','.join(item)}]" for item in (wanted, best, directions)]
        raise InputError(f"objective={shown[0]} needs hydra.sweeper.direction={shown[1]}, not {shown[2]}")
