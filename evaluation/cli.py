"""How a command begins and ends: free text is quoted for Hydra, a user's mistake is one line, Ctrl-C is exit code 130.

Hydra would print traces and hints of its own; `run` has it let every exception through. With HYDRA_FULL_ERROR=1 in the
environment all traces are shown.
"""

import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from errors import InputError


def run(main: Callable[[], None]) -> None:
    """Call a `hydra.main` function as the program, and exit."""
    if not full_traces():
        os.environ.update({"HYDRA_FULL_ERROR": "1", "PALIMPSEST_SHORT": "1"})
    # A launcher's jobs start elsewhere, where Python would not find this clone.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
    multirun = {"--multirun", "-m"} & set(sys.argv)
    for flag in multirun:  # Hydra's parser refuses it between overrides
        sys.argv.insert(1, sys.argv.pop(sys.argv.index(flag)))
    sys.argv[1:] = [quoted(argument, bool(multirun)) for argument in sys.argv[1:]]
    for flag in {"--help", "-h"} & set(sys.argv):  # the same text, without reading every choice of every group
        sys.argv.remove(flag)
        sys.argv += ["--cfg", "all", "--package", "hydra.help.template"]
    try:
        main()
    except KeyboardInterrupt:
        end("interrupted", 130)
    except Exception as error:
        line = explain(error)
        if line is None or full_traces():
            raise
        end(f"error: {line}", 1)


def quoted(argument: str, multirun: bool = False) -> str:
    """Quote the value of a setting that Hydra's grammar rejects: prompt=a dog's hat -> prompt='a dog\\'s hat'. Outside
    sweeps also a comma list with spaces: prompt=a cat, asleep is one text."""
    setting = re.fullmatch(r"([+~]{0,2}[\w./@-]+=)(.+)", argument, re.DOTALL)
    if not setting or argument.startswith("-"):
        return argument
    try:
        override = OverridesParser.create().parse_override(argument)
        accepted = multirun or not (override.is_sweep_override() and " " in setting[2])
    except HydraException:
        accepted = False
    return argument if accepted else setting[1] + QuotedString(setting[2], Quote.single).with_quotes()


def overrides() -> dict[str, str]:
    """The settings that the user typed for this Hydra job, without quotes, by name."""
    parser, typed = OverridesParser.create(), {}
    for override in HydraConfig.get().overrides.task if HydraConfig.initialized() else []:
        name, equals, value = override.lstrip("+~").partition("=")
        if equals:
            text = parser.parse_override(override).value()
            typed[name] = text if isinstance(text, str) else value
    return typed


@contextmanager
def job() -> Iterator[None]:
    """Around one Hydra job. One of a sweep that fails leaves a row with its error, and the others go on."""
    config = HydraConfig.get()
    try:
        yield
    except Exception as error:
        line = explain(error)
        if config.mode == RunMode.MULTIRUN:
            print(f"job {config.job.num}: {line or traceback.format_exc()}", file=sys.stderr)
            folder = Path(config.runtime.output_dir)
            if not any(folder.glob("rows*.jsonl")):
                row = overrides() | {"error": line or one_line(error)}
                (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        elif line is None or full_traces():
            raise
        else:  # here already: Hydra would put a line of its own before it
            end(f"error: {line}", 1)


def explain(error: BaseException) -> str | None:
    """The one line that a user needs, or None for a defect of this code."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    for cause in chain:
        if isinstance(cause, InputError):
            return str(cause)
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(cause):  # safetensors has an error of its own
            return "the disk is full: free some space, or write elsewhere with hydra.run.dir=..."
        if type(cause).__name__ == "OutOfMemoryError" or "not enough memory" in str(cause):  # torch's, CUDA and CPU
            return f"the device ran out of memory ({str(cause).splitlines()[0]})"
        if "unexpected keyword argument" in str(cause) and isinstance(chain[0], InstantiationException):
            return " ".join(str(cause).split())
    first = chain[0]
    if isinstance(first, MissingConfigException) and first.options:
        group, _, name = str(first.missing_cfg_file).rpartition("/")
        return f"{group}={name} is unknown: choose from {', '.join(sorted(first.options))}"
    if isinstance(first, HydraException | OmegaConfBaseException) and not isinstance(first, InstantiationException):
        cause = first.__cause__ if isinstance(first.__cause__, OmegaConfBaseException) else ""
        return " ".join(f"{first} {cause}".split())
    return None


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def full_traces() -> bool:
    """Whether the user, and not `run`, set HYDRA_FULL_ERROR. Processes that a launcher starts inherit the answer."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1" and "PALIMPSEST_SHORT" not in os.environ


def end(line: str, code: int) -> None:
    """Print the line on stderr and exit."""
    print(line, file=sys.stderr)
    sys.exit(code)
