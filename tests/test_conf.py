"""The settings of `edit.py` for each model and method, before anything is loaded, and methods as choices."""

import functools
from dataclasses import MISSING, fields

import pytest
from hydra.core.config_store import ConfigStore
from hydra.utils import get_class
from omegaconf import OmegaConf

from errors import InputError
from evaluation import config
from files import CLONE
from methods.base import Method
from tests.conftest import compose

CONF = CLONE / "conf"
STABLE_DIFFUSION = ["sd14", "sd15", "sd20_base", "sd21_base", "sd21"]
PAPER = {  # Imagic, section 4 and its implementation details for Stable Diffusion
    "embedding_steps": 1000, "embedding_lr": 2e-3, "tuning_steps": 1500, "tuning_lr": 5e-7, "tune": "all",
}  # fmt: skip
METHODS = sorted(
    {choice.name for choice in config.choices() if choice.group == "method"}
    | {file.stem for file in (CONF / "method").glob("*.yaml")}
)
INVERSIONS = {"null_text": "null_text", "negative_prompt": "negative_prompt", "pnp_inversion": "pnp"}


@functools.cache
def composed(*arguments):
    """`edit.py`'s settings for the given arguments, resolved, as plain dictionaries."""
    return OmegaConf.to_container(compose("edit", *arguments), resolve=True)


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_stable_diffusion_has_the_papers_settings(name):
    own, sd = composed(), composed(f"model={name}")
    assert sd["method"].items() >= PAPER.items() and own["method"] != sd["method"]
    assert sd["method"] == composed("method=imagic_sd")["method"]  # the same numbers, for any model
    inversion = composed(f"model={name}", "method=direct_inversion")
    assert inversion["method"] == composed("method=direct_inversion_paper")["method"]


def test_the_users_settings_win():
    sd15 = composed("model=sd15", "method.eta=[0.5,0.6]", "method.tuning_steps=7", "sampler=ddpm", "sampler.steps=20")
    assert (sd15["method"]["eta"], sd15["method"]["tuning_steps"]) == ([0.5, 0.6], 7)
    assert sd15["method"]["sampler"].items() >= {"eta": 1, "steps": 20}.items()
    asked = {(): (100, 0), ("sampler.steps=20", "sampler.eta=1"): (20, 1), ("sampler=ddim",): (50, 0)}
    for arguments, expected in asked.items():
        sampler = composed("method=direct_inversion_paper", *arguments)["method"]["sampler"]
        assert (sampler["steps"], sampler["eta"]) == expected


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_defaults_of_its_dataclass(name):
    """And the same settings with any model. Presets with other values are left out."""
    node, sd = composed(f"method={name}")["method"], composed(f"method={name}", "model=sd15")["method"]
    kind = get_class(node["_target_"])
    settings = {field.name: field.default for field in fields(kind)}
    assert issubclass(kind, Method) and node.keys() == sd.keys() == settings.keys() | {"_target_"}
    for setting, default in settings.items():
        if setting not in config.GROUPS and name not in ("imagic_sd", "imagic_imagen", "direct_inversion_paper"):
            assert node[setting] == default and default is not MISSING, setting
    assert node["sampler"]["eta"] == (name in ("sdedit", "ddpm_inversion"))
    if name in INVERSIONS:
        assert node["inversion"] == composed(f"inversion={INVERSIONS[name]}")["inversion"]


OWN = """from dataclasses import dataclass
from typing import ClassVar
from methods.base import Method
@dataclass
class Base(Method):
    sampler: Sampler
    strength: float = 0.5  # [t0] how far
@dataclass
class Mine(Base):
    names: ClassVar = object()
    words: str = "a # b"  # a text
    factors: tuple = (1, -2.5)
    inversion: Inversion = None
    needed: int
"""


def test_a_new_method_file_is_a_choice_at_once(tmp_path, monkeypatch):
    """And a copy of it in another file, with its classes' names, is another choice."""
    monkeypatch.setattr(ConfigStore.instance(), "repo", {})
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "copy.py").write_text(OWN.replace("0.5", "0.9"))
    config.register(tmp_path, CONF)
    methods = ConfigStore.instance().repo["method"]
    mine = {
        "_target_": "methods.mine.Mine", "sampler": "${sampler}", "strength": 0.5, "words": "a # b",
        "factors": [1, -2.5], "inversion": "${inversion}", "needed": "???",
    }  # fmt: skip
    assert OmegaConf.to_container(methods["mine.yaml"].node) == mine
    assert methods.keys() == {"copy.yaml", "mine.yaml"} and methods["copy.yaml"].node.strength == 0.9
    node = OmegaConf.create({"header": "top", "footer": "end", "text": "${help:methods.mine.Mine,sampler}"})
    assert node.text.startswith("top") and node.text.endswith("end")
    assert all(word in node.text for word in ("strength=0.5", "[t0] how far", "a # b", "ddim100"))
    (tmp_path / "mine.py").write_text(OWN.replace("0.5", "math.pi"))
    with pytest.raises(InputError, match=r"mine\.py.*strength"):
        config.register(tmp_path, CONF)
