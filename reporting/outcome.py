"""How a command ends: a user's mistake is one line on stderr, Ctrl-C is 130, a defect keeps its traceback.

Hydra would print its own traces and hints; `run` asks it to let every exception through and decides here.
With HYDRA_FULL_ERROR=1 in the environment everything is shown in full.
"""

import errno
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
from omegaconf.errors import ConfigAttributeError, OmegaConfBaseException

from errors import InputError


def explain(error: BaseException) -> str | None:
    """The one line that a user needs, or None where `error` is a defect of ours."""
    causes = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    for cause in causes:
        if isinstance(cause, InputError):
            return str(cause)
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(cause):  # safetensors raises an error of its own
            where = f" (writing {cause.filename})" if getattr(cause, "filename", None) else ""
            return f"the disk is full{where}: free some space, or write elsewhere with hydra.run.dir=..."
        # torch's own error on a GPU, and the CPU allocator's; torch is not imported for this
        if type(cause).__name__ == "OutOfMemoryError" or "not enough memory" in str(cause):
            return f"the device ran out of memory ({str(cause).splitlines()[0]})"
    first = causes[0]
    if isinstance(first, MissingConfigException) and first.options:
        group, _, name = str(first.missing_cfg_file).rpartition("/")
        more = '; pip install -e ".[sweep]" brings more' if group.startswith("hydra/") else ""
        return f"{group}={name} is unknown: choose from {', '.join(sorted(first.options))}{more}"
    if str(first) == "No trials are completed yet.":  # Optuna's, after the last job; each has told its own error
        return "every job failed, so there is no best one"
    if isinstance(first, InstantiationException):
        unknown = [str(cause) for cause in causes if "unexpected keyword argument" in str(cause)]
        return " ".join(unknown[-1].split()) if unknown else None
    if isinstance(first, HydraException | OmegaConfBaseException):
        cause = first.__cause__
        if isinstance(cause, ConfigAttributeError) and (name := re.search(r"override '(.+?)'", str(first))):
            return f"there is no setting {name[1]}: --cfg job lists those that exist"
        told = f"{first} {cause}" if isinstance(cause, OmegaConfBaseException) else str(first)
        return " ".join(told.split())
    return None


@contextmanager
def job() -> Iterator[None]:
    """Around one Hydra job. In a sweep, one that fails leaves its error in `error.txt`; the others go on."""
    config = HydraConfig.get()
    failure = Path(config.runtime.output_dir, "error.txt")
    failure.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        line = explain(error)
        if config.mode == RunMode.MULTIRUN:
            print(f"job {config.job.num}: {line or traceback.format_exc()}", file=sys.stderr)
            failure.write_text((line or f"{type(error).__name__}: {error}") + "\n")
        elif line is None or full_traces():
            raise
        else:  # here already: Hydra would put a line of its own before it
            end(f"error: {line}", 1)


def run(main: Callable[[], None]) -> None:
    """Call a `hydra.main` function as the program, and exit."""
    if not full_traces():
        os.environ.update({"HYDRA_FULL_ERROR": "1", "PALIMPSEST_SHORT": "1"})
    for flag in {"--multirun", "-m"} & set(sys.argv):  # Hydra's parser wants it before the overrides
        sys.argv.insert(1, sys.argv.pop(sys.argv.index(flag)))
        # Where a launcher starts its jobs this program is no longer the script whose folder Python searches.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
    sys.argv[1:] = [literal(argument) for argument in sys.argv[1:]]
    try:
        main()
    except KeyboardInterrupt:
        end("interrupted", 130)
    except Exception as error:
        line = explain(error)
        if line is None or full_traces():
            raise
        end(f"error: {line}", 1)


TEXTS = re.compile(r"(\+{0,2}(?:image|prompt|source_prompt|method\.inversion_prompt|model\.weights)=)(.*)", re.DOTALL)
QUOTED = r"""\s*('(\\.|[^'\\])*'|"(\\.|[^"\\])*")\s*"""  # one quoted string of Hydra's grammar


def literal(argument: str) -> str:
    """A setting that is free text, quoted for Hydra, whose grammar gives commas, apostrophes and brackets a meaning:
    prompt=a dog's hat -> prompt='a dog\\'s hat'. What is quoted already ('a, b','c' sweeps over two), null and
    nothing are left as they are, and so are any other setting, and several weights, which are a sweep."""
    text = TEXTS.fullmatch(argument)
    if text and "model.weights" in text[1] and "," in text[2]:
        return argument
    if not text or text[2] in ("", "null") or re.fullmatch(f"{QUOTED}(,{QUOTED})*", text[2], re.DOTALL):
        return argument
    return text[1] + QuotedString(text[2], Quote.single).with_quotes()


def unquoted(override: str) -> str:
    """A setting as a person wrote it: `literal`, undone."""
    if not TEXTS.fullmatch(override):
        return override
    value = OverridesParser.create().parse_override(override).value()
    return f"{override.split('=', 1)[0]}={value}" if isinstance(value, str) else override


def full_traces() -> bool:
    """Whether the user, and not `run`, set HYDRA_FULL_ERROR; processes that a launcher starts inherit the answer."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1" and "PALIMPSEST_SHORT" not in os.environ


def end(line: str, code: int) -> None:
    """Say the line on stderr and leave."""
    print(line, file=sys.stderr)
    sys.exit(code)
