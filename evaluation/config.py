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
GROUPS = {"sampler": "${sampler}", "inversion": "${inversion}"}  # fields that are choices of their own


class Source(NamedTuple):
    """A class in methods/, as its file says it."""

    file: Path
    name: str
    bases: list[str]
    fields: dict[str, tuple[ast.AnnAssign, str]]  # its own, each with the comment behind it


def register(methods: Path = CLONE / "methods", conf: Path = CLONE / "conf") -> None:
    """Register each method, each inversion, and conf/suited.yaml as `suited=FAMILY_METHOD`. Raises InputError where a
    file is not Python, or a default is not a plain value."""
    store, classes, settings = ConfigStore.instance(), read(methods), {}
    for source in classes:
        line, target = ancestors(source, classes), f"methods.{source.file.stem}.{source.name}"
        if any("Method" in each.bases for each in line):
            name = source.file.stem
            group = "settings" if (conf / "method" / f"{name}.yaml").exists() else "method"
        elif line[0].name == "Inversion":  # itself is DDIM's
            group, name = "inversion", snake_case(source.name) if source.bases else "ddim"
        else:
            continue
        settings[target] = {name: item for each in line for name, item in default_values(each).items()}
        defaults = {name: default for name, (default, _) in settings[target].items()}
        store.store(group=group, name=name, node={"_target_": target, **defaults})
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


def read(folder: Path) -> list[Source]:
    """The classes of all files in a folder."""
    classes = []
    for file in sorted(folder.glob("*.py")):
        lines = file.read_text(encoding="utf-8").splitlines()
        try:
            tree = ast.parse("\n".join(lines))
        except SyntaxError as error:
            raise InputError(f"{file}, line {error.lineno}: {error.msg}") from None
        for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            fields = {}
            for item in (item for item in node.body if isinstance(item, ast.AnnAssign)):
                if "ClassVar" in ast.unparse(item.annotation):
                    continue
                comment = lines[item.end_lineno - 1].encode()[item.end_col_offset :].decode().strip(" #")
                fields[item.target.id] = item, comment
            bases = [ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases]
            classes.append(Source(file, node.name, bases, fields))
    return classes


def ancestors(source: Source, classes: list[Source]) -> list[Source]:
    """The class and those that it derives from, itself last. Among namesakes, that of the same file is meant."""
    line = []
    for base in reversed(source.bases):
        named = [other for other in classes if other.name == base]
        for other in sorted(named, key=lambda other: other.file != source.file)[:1]:
            line += ancestors(other, classes)
    return [*line, source]


def default_values(source: Source) -> dict[str, tuple[Any, str]]:
    """The default of each of a class's own fields, as Hydra's configs hold it, and its comment."""
    values = {}
    for name, (item, comment) in source.fields.items():
        try:
            value = MISSING if item.value is None else ast.literal_eval(item.value)
        except ValueError:
            raise InputError(
                f"{source.file}, line {item.lineno}: the default of {name} must be a plain value: a number, a text, "
                "True, False, None, or a list of these"
            ) from None
        values[name] = GROUPS.get(name, value), comment
    return values


def snake_case(name: str) -> str:
    """NullText -> null_text, PnP -> pnp."""
    return re.sub(r"(?<=.)(?=[A-Z][a-z])", "_", name).lower()
