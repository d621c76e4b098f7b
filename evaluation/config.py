"""Make every method a choice of Hydra's: method=NAME for methods/NAME.py, with the dataclass's fields as its settings.

A default stands in the dataclass alone. The source is read, not imported, since torch takes seconds to import. YAML in
conf/method holds presets: NAME.yaml builds on /settings/NAME, the dataclass in methods/NAME.py; others on the choices.
"""

import ast
import json
import re
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.config_store import ConfigStore
from hydra.utils import get_class
from omegaconf import MISSING, OmegaConf

from errors import InputError, made
from files import CLONE

HEADING = """# Methods and their settings

Made from the dataclasses by `python -m evaluation.config > docs/methods.md`. In brackets: the symbol in the paper."""
GROUPS = {"sampler": "${sampler}", "inversion": "${inversion}"}  # fields that are choices of their own
OTHERS = {  # registered as settings/NAME
    "sampler": "samplers.sampler.Sampler", "metrics": "evaluation.metrics.Metrics",
    "cache": "evaluation.cache.TuningCache",
}  # fmt: skip


class Choice(NamedTuple):
    """A dataclass whose fields are settings, as its file says it."""

    group: str  # method, inversion, or one of OTHERS
    name: str
    target: str  # to be instantiated
    settings: dict[str, tuple[Any, str]]  # each default, as Hydra's configs hold it, and the comment behind it


def choices(methods: Path = CLONE / "methods") -> list[Choice]:
    """Every method and inversion in the folder's files, with the settings that they inherit, and the OTHERS."""
    known, found = {file.stem: read(file) for file in sorted(methods.glob("*.py"))}, []
    for module, name in [(module, name) for module, classes in known.items() for name in classes]:
        roots, settings = inherited(known, module, name)
        if "Inversion" in roots:  # itself is DDIM's; NullText -> null_text, PnP -> pnp
            own = "ddim" if roots == {name} else re.sub(r"(?<=.)(?=[A-Z][a-z])", "_", name).lower()
            found.append(Choice("inversion", own, f"methods.{module}.{name}", settings))
        elif "Method" in roots - {name}:
            found.append(Choice("method", module, f"methods.{module}.{name}", settings))
    for group, target in OTHERS.items():
        module, _, name = target.rpartition(".")
        found.append(Choice(group, group, target, read(CLONE / f"{module.replace('.', '/')}.py")[name][1]))
    return found


def inherited(known: dict, module: str, name: str) -> tuple[set[str], dict]:
    """The names of a class's first ancestors, and its settings. Among namesakes, that of the same file is meant."""
    module = module if name in known[module] else next((other for other in known if name in known[other]), "")
    bases, settings = known.get(module, {}).get(name, ((), {}))
    roots = set() if bases else {name}
    for base in bases:
        more, others = inherited(known, module, base)
        roots, settings = roots | more, others | settings
    return roots, settings


def build(nodes: dict, name: str) -> Any:
    """The object of the _target_ at `name`, with the sampler and the inversion in it. Hydra's own would resolve a text
    `${...}` once more. Raises InputError where there is none, and for a setting that it does not have."""
    node = nodes.get(name)
    if not isinstance(node, dict) or "_target_" not in node:
        raise InputError(f"{name}={node} is unknown: it takes settings, {name}.SETTING=VALUE")
    settings = {key: build(node, key) if key in GROUPS else value for key, value in node.items() if key != "_target_"}
    return made(get_class(node["_target_"]), **settings)


def markdown() -> str:
    """The settings of all methods as Markdown: the page docs/methods.md."""
    lines = [HEADING]
    for group, name, _, settings in choices():
        title = group if group in OTHERS else f"{group}={name}"
        lines += ["", f"## {title}", "", "| setting | default | meaning |", "|---|---|---|"]
        own = ((name, *item) for name, item in settings.items() if name not in GROUPS)
        lines += [f"| `{group}.{n}` | {json.dumps(value)} | {about.replace('|', 'or')} |" for n, value, about in own]
    return "\n".join([*lines, ""])


def register(methods: Path = CLONE / "methods", conf: Path = CLONE / "conf") -> None:
    """Register methods, inversions and conf/suited.yaml as `suited=FAMILY_METHOD`. Raises InputError as `read` does."""
    store, settings = ConfigStore.instance(), {}
    for group, name, target, own in choices(methods):
        settings[target] = own
        preset = group in OTHERS or (conf / group / f"{name}.yaml").exists()
        defaults = {name: default for name, (default, _) in own.items()}
        store.store(group="settings" if preset else group, name=name, node={"_target_": target, **defaults})
    for family, suited in OmegaConf.load(conf / "suited.yaml").items():
        for method, node in suited.items():
            store.store(group="suited", name=f"{family}_{method}", node=node, package="_global_")

    def help_text(target: str, *groups: str, _parent_) -> str:
        """`hydra.help.header`, the chosen method's settings, the choices of some groups, and `hydra.help.footer`."""
        lines = ["Settings of the chosen method (method.NAME=VALUE):", ""]
        for name, (default, comment) in settings[target].items():
            value = default if isinstance(default, str) else json.dumps(default)
            lines += [] if name in GROUPS else [f"  {f'{name}={value}':<28} {comment}"]
        lines += ["", "Choices (group=option):", ""]
        for group in groups:
            options = {*store.repo.get(group, {}), *(file.name for file in (conf / group).glob("*.yaml"))}
            lines.append(f"  {group:<12} {', '.join(sorted(name.removesuffix('.yaml') for name in options))}")
        return "\n".join([_parent_.header, *lines, "", _parent_.footer])

    OmegaConf.register_new_resolver("help", help_text, replace=True)
    # Two runs may begin in one second: the end of a default folder's name, the same wherever a job asks for it.
    OmegaConf.register_new_resolver("unique", lambda: uuid.uuid4().hex[:4], replace=True, use_cache=True)


def read(file: Path) -> dict[str, tuple[list[str], dict]]:
    """The classes of a file: their bases' names and their own settings. Raises InputError unless defaults are plain."""
    text, classes = file.read_text(encoding="utf-8"), {}
    for node in (node for node in ast.parse(text, file).body if isinstance(node, ast.ClassDef)):
        settings = {}
        for item in (item for item in node.body if isinstance(item, ast.AnnAssign)):
            if "ClassVar" in ast.unparse(item.annotation):
                continue
            name, comment = item.target.id, text.splitlines()[item.end_lineno - 1].encode()[item.end_col_offset :]
            try:
                value = MISSING if item.value is None else ast.literal_eval(item.value)
            except ValueError:
                raise InputError(f"{file}: the default of {name} must be a number or another plain value") from None
            settings[name] = GROUPS.get(name, value), comment.decode().strip(" #")
        classes[node.name] = [ast.unparse(base).rpartition(".")[2] for base in node.bases], settings
    return classes


if __name__ == "__main__":
    print(markdown(), end="")
