"""How a command begins and ends: free text is quoted for Hydra, a user's mistake is one line, Ctrl-C is exit code 130.

Hydra would print traces and hints of its own; `run` has it let every exception through.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from errors import InputError
from files import CLONE

# Free text and paths: one text, whatever stands in it, unless it is quoted or null. A sweep may list several.
TEXT = re.compile(
    r"\+*(image|mask|(source_|negative_)?prompt|(task|data)\.path|model\.(weights|vae)|cache\.dir|init|out)="
)
LESS_IS_BETTER = ("mse", "lpips", "structure_distance", "change_error", "seconds", "evaluations", "peak_memory_gb")


def run(main: Callable[[], None]) -> None:
    """Call a `hydra.main` function as the program, and exit."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # A launcher's jobs start elsewhere, where Python would not find this clone.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
    for flag in (multirun := {"--multirun", "-m"} & set(sys.argv)):  # Hydra's parser refuses it between overrides
        sys.argv.insert(1, sys.argv.pop(sys.argv.index(flag)))
    for before, word in pairwise(sys.argv):
        if word != word.encode(errors="replace").decode():
            end(f"error: {word!r} is not text in UTF-8", 1)
        if "=" not in word and word[:1] not in "-~" and (before[:1] != "-" or before in ("-m", "--multirun")):
            end(f"error: {word!r} is not of the form name=value: type image=dog.jpg prompt='a sitting dog'", 1)
    sys.argv[1:] = [quoted(argument, bool(multirun)) for argument in sys.argv[1:]]
    for flag in {"--help", "-h"} & set(sys.argv):  # the same text, without reading every choice of every group
        sys.argv.remove(flag)
        sys.argv += ["--cfg", "all", "--package", "hydra.help.template"]
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        end("interrupted", 130)
    except BrokenPipeError:  # the reader of the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        sys.exit(141)
    except Exception as error:
        end_with(error)


def quoted(argument: str, multirun: bool = False) -> str:
    """Quote the value of a setting that Hydra's grammar rejects: prompt=a dog's hat -> prompt='a dog\\'s hat'. Outside
    sweeps also any free text, and a comma list with spaces. `${` in a prompt stands for itself."""
    setting = re.fullmatch(r"([+~]{0,2}[\w./@][\w./@-]*=)(.+)", argument, re.DOTALL)
    if not setting:
        return argument
    name, value = setting.groups()
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if name in ("prompt=", "source_prompt=", "negative_prompt="):
        value = literal
    text = TEXT.fullmatch(name) and value != "null" and value[0] not in "'\""
    with suppress(HydraException):
        override = OverridesParser.create().parse_override(name + value)
        if multirun or not (text or (override.is_sweep_override() and " " in value)):
            return name + value
        return name + QuotedString(value, Quote.single).with_quotes()
    return name + QuotedString(literal, Quote.single).with_quotes()


def overrides() -> dict[str, str]:
    """The settings that the user typed for this Hydra job, without quotes, by name."""
    given, typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else [], {}
    for override in OverridesParser.create().parse_overrides(list(given)):
        value = override.value()
        text = value if isinstance(value, str) else override.input_line.partition("=")[2]
        typed[override.key_or_group] = re.sub(r"(\\*)\1\\\$\{", r"\1${", text)  # as it was before `quoted`
    return typed


@contextmanager
def job() -> Iterator[None]:
    """Around one Hydra job. One of a sweep that fails leaves a row with its error, and the others go on."""
    config = HydraConfig.get()
    failure = Path(config.runtime.output_dir) / "rows-failure.jsonl"
    failure.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        if config.mode != RunMode.MULTIRUN:
            end_with(error)  # here already: Hydra would put a line of its own before it
        print(f"job {config.job.num}: {explain(error) or traceback.format_exc()}", file=sys.stderr)
        row = overrides() | {"error": explain(error) or repr(error)}
        failure.write_text(json.dumps(row) + "\n", encoding="utf-8")


class Summary(Callback):
    """Hydra's callback for `--multirun`. Exits with 1 if a job failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        """Exit unless each job has its own folder, and a sweeper that optimises moves each metric the better way."""
        if "${" not in OmegaConf.to_container(config.hydra.sweep)["subdir"]:
            sys.exit("error: hydra.sweep.subdir must hold ${hydra.job.num}, or the jobs write over each other")
        given = OmegaConf.select(config, "hydra.sweeper.direction"), config.objective or []
        directions, names = ([*each] if isinstance(each, list | ListConfig) else [each] for each in given)
        best = ["minimize" if name.startswith(LESS_IS_BETTER) else "maximize" for name in names]
        if directions != [None] and ([getattr(each, "name", each) for each in directions] != best or not names):
            sys.exit(f"error: this sweeper needs objective=METRIC, and hydra.sweeper.direction={best} for it")

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        """Report on all jobs from their folders, so that any launcher may have run them."""
        from evaluation import report

        folder = Path(config.hydra.sweep.dir)
        rows = report.read(folder)
        failed = rows[rows["error"].notna() & rows["task"].isna()]["job"].nunique()
        print(f"{report.write(folder, rows, rows['task'].nunique())}\n{rows['job'].nunique()} jobs, {failed} failed")
        if failed:
            sys.exit(1)


def provenance() -> dict:
    """The command, the versions that it runs with, and the commit, with "-dirty" after it where files are changed."""
    git, commit = ["git", "-C", CLONE, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], ""
    with suppress(OSError):  # no git
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {name: version(name) for name in ("torch", "open_clip_torch", "timm", "numpy", "pillow")}
    return {"command": shlex.join(sys.argv), "commit": commit, "versions": {"python": sys.version} | versions}


def explain(error: BaseException) -> str | None:
    """The one line that a user needs, or None for a defect of this code."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name} is unknown: choose from {', '.join(sorted(error.options))}"
    cause = error
    while cause:
        text = " ".join(str(cause).split())
        if isinstance(cause, InputError):
            return text
        if isinstance(cause, MemoryError) or re.search("OutOfMemory|not enough memory|allocate memory", repr(cause)):
            return f"the device ran out of memory ({text})"
        if (isinstance(cause, OSError) and cause.filename) or "No space left" in text:  # safetensors has its own error
            return f"{text} (hydra.run.dir=PATH and cache.dir=PATH say where files are written)"
        if "home directory" in text:
            return f"{text} Set HOME"
        cause = cause.__cause__ or cause.__context__
    raised_in = "".join(frame.filename for frame in traceback.extract_tb(error.__traceback__)[-1:])
    theirs = isinstance(error, HydraException | OmegaConfBaseException) or re.search("/(hydra|omegaconf)/", raised_in)
    reason = str(error.__cause__ or "").partition("\n")[0]
    return " ".join(f"{error} {reason}".split()) if theirs else None


def end_with(error: BaseException) -> None:
    """Exit with 1 and the line that explains the error, or raise it."""
    if line := explain(error):
        end(f"error: {line}", 1)
    raise error


def end(line: str, code: int) -> None:
    """Print the line on stderr and exit."""
    print(line, file=sys.stderr)
    sys.exit(code)
