"""The error of a user's mistake, and the ranges of settings.

Any room raises it with a line that names the mistake and a right choice, which `edit.py` and `train.py` print before
they exit with 1. Every other exception is a defect of this code and keeps its traceback.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

MOST = 10**9  # the largest value of a setting: no longer loop ends, and no larger tensor fits


class InputError(ValueError):
    """A user's mistake, in one line."""


def check_number(name: str, value: Any, whole: bool = False, low: float = 0, high: float = MOST) -> None:
    """Raise InputError unless `value` is a number, a whole one if so asked, from `low` to `high`."""
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise InputError(f"{name} is {value}: it must be a {'whole ' * whole}number from {low} to {high}")


def check(settings: Any, shares: Sequence[str] = (), counts: Sequence[str] = (), **choices: Iterable[str]) -> None:
    """Raise InputError for a dataclass's value of another type than declared; for a number that is negative or
    above MOST, above 1 among `shares`, or below 1 among `counts`; and for a field in `choices` with another value."""
    for field, kind in get_type_hints(type(settings)).items():
        kinds, value = get_args(kind) if isinstance(kind, UnionType) else (kind,), getattr(settings, field)
        name = f"{settings.group}.{field}"
        if field in choices and value not in [*choices[field]]:
            raise InputError(f"{name} is {value}: choose one of {', '.join(choices[field])}")
        if value is None and NoneType in kinds:
            continue
        for plain, what in ((bool, "true or false"), (str, "a text")):
            if plain in kinds and not isinstance(value, plain):
                raise InputError(f"{name} is {value}: it must be {what}")
        several = Sequence[float] in kinds and isinstance(value, Sequence) and value
        for number in (value if several else [value]) if {int, float} & set(kinds) else ():
            check_number(name, number, float not in kinds, int(field in counts), 1 if field in shares else MOST)


def made(kind: Callable, /, *own: Any, **settings: Any) -> Any:
    """`kind` called with its own arguments and the user's settings. Raises InputError for one that it does not have."""
    try:
        inspect.signature(kind).bind(*own, **settings)
    except TypeError as error:
        raise InputError(f"{kind.__module__}.{kind.__name__}: {error}") from error
    return kind(*own, **settings)
