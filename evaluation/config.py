"""Make every method a choice of Hydra's: method=NAME for methods/NAME.py, with the dataclass's fields as its settings.

A default stands in the dataclass alone. The source is read, not imported, since torch takes seconds to import. YAML in
conf/method holds presets: NAME.yaml builds on /settings/NAME, the dataclass in methods/NAME.py; others on the choices.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from errors import InputError

CLONE = Path(__file__).resolve().parent.parent
HEADING = """# Methods and their settings

Made from the dataclasses in `methods/` by `python -m evaluation.config > docs/methods.md`. In brackets: the
symbol in the paper."""
GROUPS = {"sampler": "${sampler}", "inversion": "${inversion}"}  # fields that are choices of their own


class Class(NamedTuple):
    """A class in methods/, as its file says it."""

    module: str
    name: str
    bases: list[str]
    settings: dict[str, tuple[Any, str]]  # its own: each default, as Hydra's configs hold it, and the comment behind it


class Choice(NamedTuple):
    """A method or an inversion, with the settings of its class and of those that it derives from."""

    group: str  # method or inversion
    name: str
    target: str  # to be instantiated
    settings: dict[str, tuple[Any, str]]


def choices(methods: Path = CLONE / "methods") -> list[Choice]:
    """Every method and inversion in the folder's files."""
    found, classes = [], [each for file in sorted(methods.glob("*.py")) for each in read(file)]
    for own in classes:
        line, group, name = ancestors(own, classes), "method", own.module
        if line[0].name == "Inversion":  # itself is DDIM's; NullText -> null_text, PnP -> pnp
            name = re.sub(r"(?<=.)(?=[A-Z][a-z])", "_", own.name).lower() if own.bases else "ddim"
            group = "inversion"
        elif not any("Method" in each.bases for each in line):
            continue
        settings = {name: item for each in line for name, item in each.settings.items()}
        found.append(Choice(group, name, f"methods.{own.module}.{own.name}", settings))
    return found


def markdown() -> str:
    """The settings of all methods as Markdown: the page docs/methods.md."""
    lines = [HEADING]
    for choice in choices():
        lines += ["", f"## {choice.group}={choice.name}", "", "| setting | default | meaning |", "|---|---|---|"]
        own = {name: item for name, item in choice.settings.items() if name not in GROUPS}
        for name, (default, about) in own.items():
            lines.append(f"| `{choice.group}.{name}` | {json.dumps(default)} | {about.replace('|', 'or')} |")
    return "\n".join([*lines, ""])


def register(methods: Path = CLONE / "methods", conf: Path = CLONE / "conf") -> None:
    """Register each method, each inversion, and conf/suited.yaml as `suited=FAMILY_METHOD`. Raises InputError where a
    default is not a plain value."""
    store, settings = ConfigStore.instance(), {}
    for group, name, target, own in choices(methods):
        settings[target] = own
        preset = (conf / group / f"{name}.yaml").exists()
        defaults = {name: default for name, (default, _) in own.items()}
        store.store(group="settings" if preset else group, name=name, node={"_target_": target, **defaults})
    for family, suited in OmegaConf.load(conf / "suited.yaml").items():
        for method, node in suited.items():
            store.store(group="suited", name=f"{family}_{method}", node=node, package="_global_")

    def help_text(target: str, *groups: str, _parent_) -> str:
        """`hydra.help.header`, the chosen method's settings, the choices of some groups, and `hydra.help.footer`."""
        lines = ["Settings of the chosen method (method.NAME=VALUE):", ""]
        for name, (default, comment) in settings[target].items():
            if name not in GROUPS:
                value = default if isinstance(default, str) else json.dumps(default)
                lines.append(f"  {f'{name}={value}':<28} {comment}")
        lines += ["", "Choices (group=option):", ""]
        for group in groups:
            options = {*store.repo.get(group, {}), *(file.name for file in (conf / group).glob("*.yaml"))}
            lines.append(f"  {group:<12} {', '.join(sorted(name.removesuffix('.yaml') for name in options))}")
        return "\n".join([_parent_.header, *lines, "", _parent_.footer])

    OmegaConf.register_new_resolver("help", help_text, replace=True)


def read(file: Path) -> list[Class]:
    """The classes of a file."""
    text, classes = file.read_text(encoding="utf-8"), []
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
        bases = [ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases]
        classes.append(Class(file.stem, node.name, bases, settings))
    return classes


def ancestors(own: Class, classes: list[Class]) -> list[Class]:
    """The class and those that it derives from, itself last. Among namesakes, that of the same file is meant."""
    known = {other.name: other for other in sorted(classes, key=lambda other: other.module == own.module)}
    line = [each for base in reversed(own.bases) if base in known for each in ancestors(known[base], classes)]
    return [*line, own]


if __name__ == "__main__":
    print(markdown(), end="")
