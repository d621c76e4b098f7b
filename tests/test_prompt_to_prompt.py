"""Prompt-to-Prompt and the three inversions edited by it: words, maps, and what each source branch returns to."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import TINY, randomised
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from data.tasks import EditTask
from errors import InputError
from methods.base import Reporter
from methods.ddim_inversion import DDIMInversion
from methods.negative_prompt import NegativePrompt
from methods.null_text import NullText
from methods.pnp_inversion import PnPInversion
from methods.prompt_to_prompt import PromptToPrompt, word_factors, word_map
from samplers import Sampler

METHODS = [PromptToPrompt, NegativePrompt, NullText, PnPInversion]
BEGIN = 1  # the first word's place
WORDS = ["a", "red", "blue", "cat", "dog", "construction", "hippopotamus", "runs", "fast"]


@pytest.fixture(scope="module")
def task():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return EditTask(image, "a red dog", "a red cat")


def made(kind=PromptToPrompt, steps=4, **settings):
    return kind(Sampler(steps=steps), **settings)


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# Which words take whose maps.


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=7), st.sampled_from(["replace", "refine"]))
def test_identical_prompts_take_every_token_from_its_counterpart(tiny_model, words, mode):
    takes, own = word_map(tiny_model.text, " ".join(words), " ".join(words), mode)
    assert torch.equal(takes, torch.eye(24)) and not own.any()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(WORDS), max_size=7),
    st.lists(st.sampled_from(WORDS), max_size=7),
    st.sampled_from(["replace", "refine"]),
)
def test_a_token_takes_maps_or_keeps_its_own_and_no_attention_is_made(tiny_model, a, b, mode):
    takes, own = word_map(tiny_model.text, " ".join(a), " ".join(b), mode)
    ids = tiny_model.text.tokenize([" ".join(a), " ".join(b)])
    assert torch.equal(takes.any(dim=0), own == 0)
    assert (takes.sum(dim=1) <= 1 + 1e-6).all()  # a source token's attention is handed on once, or lost
    assert takes[0, 0] == 1 and takes[ids[0].argmax(), ids[1].argmax()] == 1  # begin and end
    if mode == "refine":
        i, j = takes.nonzero().T
        assert torch.equal(ids[0][i], ids[1][j]) and (i.diff() > 0).all() and (j.diff() > 0).all()


def test_word_swap_gives_each_word_its_counterparts_maps(tiny_model):
    text = tiny_model.text
    assert [int(text.tokenize([w])[0].argmax()) - 1 for w in ("hippopotamus", "cat", "fox")] == [3, 1, 1]
    takes, own = word_map(text, "a red cat runs", "a blue hippopotamus runs", "replace")
    assert not own[:7].any()
    assert takes[BEGIN + 1, BEGIN + 1] == 1  # blue from red, and not from cat
    close(takes[BEGIN + 2, BEGIN + 2 : BEGIN + 5], torch.full((3,), 1 / 3), 1e-6)
    assert takes[BEGIN + 3, BEGIN + 5] == 1  # runs
    takes, own = word_map(text, "a hippopotamus runs", "a cat runs", "replace")
    assert torch.equal(takes[BEGIN + 1 : BEGIN + 4, BEGIN + 1], torch.ones(3)) and takes[BEGIN + 4, BEGIN + 2] == 1
    takes, own = word_map(text, "a red cat runs", "a fox runs", "replace")  # two words to one
    assert torch.equal(takes[BEGIN + 1 : BEGIN + 3, BEGIN + 1], torch.ones(2))


def test_new_words_keep_their_own_maps(tiny_model):
    for mode in ("replace", "refine"):
        takes, own = word_map(tiny_model.text, "a cat", "a red cat runs", mode)
        assert own.nonzero().flatten().tolist() == [BEGIN + 1, BEGIN + 3]
        assert takes[BEGIN + 1, BEGIN + 2] == 1 and takes[BEGIN + 2, BEGIN + 4] == 1  # cat, end
        assert takes[BEGIN + 3, BEGIN + 5] == 1  # the first padding
    takes, own = word_map(tiny_model.text, "a red cat", "a blue cat", "refine")
    assert own.nonzero().flatten().tolist() == [BEGIN + 1]


def test_reweighting_finds_words_and_phrases(tiny_model):
    factors = word_factors(tiny_model.text, "a red hippopotamus, on a red bus", {"Red": 2, "hippopotamus": -1, "a": 0})
    assert factors[:10].tolist() == [1, 0, 2, -1, -1, -1, 1, 1, 0, 2]
    assert word_factors(tiny_model.text, "a red bus", {"red bus": 3})[:5].tolist() == [1, 1, 3, 3, 1]
    for missing in ("blue", "", "red red"):
        with pytest.raises(InputError, match=f"reweight names {missing}, which is not in the prompt: a red bus"):
            word_factors(tiny_model.text, "a red bus", {missing: 2})


# The maps themselves.


def test_maps_are_edited_as_the_paper_says():
    """Against maps written out in float64, for a batch of (null, null, source, target)."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 2, n, 8, generator=g) for n in (9, 5, 5))
    words, own, factors = torch.rand(5, 5, generator=g), torch.rand(5, generator=g), torch.rand(5, generator=g)
    maps = (q.double() @ k.double().mT / 8**0.5).softmax(dim=-1)
    edited = maps.clone()
    edited[3] = (torch.einsum("hns,st->hnt", maps[2], words.double()) + maps[3] * own) * factors
    method = made(cross_replace=0.5, self_replace=0.25)
    close(method.control(0.49, words, own, factors)(q, k, v, True), (edited @ v.double()).float(), 1e-5)
    assert method.control(0.5, words, own, factors)(q, k, v, True) is None

    k, v = (torch.randn(4, 2, 9, 8, generator=g) for _ in range(2))
    maps = (q.double() @ k.double().mT / 8**0.5).softmax(dim=-1)
    edited = (torch.stack([*maps[:3], maps[2]]) @ v.double()).float()
    close(method.control(0.24, words, own, factors)(q, k, v, False), edited, 1e-5)
    assert method.control(0.25, words, own, factors)(q, k, v, False) is None
    large = torch.zeros(2, 1, 32**2 + 1, 8)
    assert method.control(0.0, words, own, factors)(large, large, large, False) is None


@pytest.mark.parametrize("kind", [PromptToPrompt, NegativePrompt, NullText])
@pytest.mark.parametrize("w", [1.0, 3.0])
def test_identical_prompts_give_the_reconstruction(tiny_model, task, kind, w):
    result = made(kind, guidance_scale=w).edit(tiny_model, replace(task, prompt=task.source_prompt))
    close(result.edits[0].image, result.reconstruction)


def test_without_replacing_it_is_plain_ddim_inversion(tiny_model, task):
    plain = DDIMInversion(Sampler(steps=4), guidance_scale=2.5).edit(tiny_model, task)
    result = made(guidance_scale=2.5, cross_replace=0, self_replace=0).edit(tiny_model, task)
    close(result.tensors["edited_latents"], plain.tensors["edited_latents"])
    close(result.tensors["inverted_latent"], plain.tensors["inverted_latent"])


@pytest.mark.parametrize("change", [{"cross_replace": 0.0}, {"self_replace": 0.0}, {"words": "refine"}])
def test_every_part_of_it_matters(tiny_model, task, change):
    plain = made(guidance_scale=2.5).edit(tiny_model, task).tensors["edited_latents"]
    other = made(guidance_scale=2.5, **change).edit(tiny_model, task).tensors["edited_latents"]
    assert (plain - other).abs().max() > 1e-4


def test_reweighting_changes_the_edit_and_not_the_reconstruction(tiny_model, task):
    plain, same, more = (made(reweight=r).edit(tiny_model, task) for r in (None, {"dog": 1}, {"dog": 4}))
    assert torch.equal(plain.edits[0].image, same.edits[0].image)
    assert (plain.tensors["edited_latents"] - more.tensors["edited_latents"]).abs().max() > 1e-4
    assert torch.equal(plain.reconstruction, more.reconstruction)


def test_texts_are_projected_anew_only_where_the_null_text_is_another(tiny_model, task, monkeypatch):
    contexts, project = [], tiny_model.project_context
    monkeypatch.setattr(tiny_model, "project_context", lambda c: contexts.append(len(c)) or project(c))
    for kind, times in ((PromptToPrompt, 1), (NegativePrompt, 1), (PnPInversion, 1), (NullText, 2)):
        contexts.clear()
        made(kind, 2).edit(tiny_model, task)
        assert contexts.count(4) == times


def test_the_backend_is_the_chosen_one_and_makes_no_difference(tiny_model, task):
    results = []
    for backend in ("sdpa", "reference"):
        model = copy.deepcopy(tiny_model)
        model.unet.attention.backend = backend
        results.append(made().edit(model, task).tensors["edited_latents"])
    close(*results)


@pytest.mark.parametrize("kind", METHODS)
def test_a_source_prompt_is_needed_and_the_model_is_handed_back(tiny_model, task, kind):
    with pytest.raises(InputError, match="needs source_prompt"):
        made(kind).edit(tiny_model, replace(task, source_prompt=""))
    before = tiny_model.fingerprint
    made(kind, steps=2).edit(tiny_model, task)
    assert tiny_model.fingerprint == before and not any(p.requires_grad for p in tiny_model.parameters())
    assert tiny_model.unet.attention.hook is None


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": -1}, {"guidance_scale": 0.0}, {"cross_replace": 1.1}, {"self_replace": -0.1},
        {"words": "swap"}, {"fixed_point_steps": 0.5}, {"reweight": {"dog": "much"}}, {"reweight": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(InputError, match=rf"method\.{next(iter(settings))}"):
        made(**settings)


@pytest.mark.parametrize("sampler", [Sampler("ddpm"), Sampler(eta=0.5)])
def test_the_path_must_be_walked_both_ways(sampler):
    with pytest.raises(InputError, match=r"sampler\.kind=ddim and sampler\.eta=0"):
        PromptToPrompt(sampler)


# PnP inversion, negative-prompt inversion, null-text inversion.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pnp_inversions_source_branch_is_the_input(task, dtype):
    model = randomised(models.build(TINY, seed=0)).to(dtype)
    task = replace(task, image=task.image.to(dtype))
    result = made(PnPInversion, guidance_scale=7.5).edit(model, task)
    assert result.metrics["reconstruction_error"] == 0
    expected = model.decode_latents(model.encode_image(task.image))[0].float().clamp(-1, 1)
    close(result.reconstruction, expected, 1e-5 if dtype == torch.float32 else 1e-2)
    assert made(guidance_scale=7.5).edit(model, task).metrics["reconstruction_error"] > 0.01


def test_pnp_inversion_adds_the_distance_to_the_source_branch_alone(tiny_model, task):
    x, recorded = torch.randn(2, 4, 8, 8), torch.randn(1, 4, 8, 8)
    distance = recorded - x[:1]  # o of algorithm 1, and 0 for the target
    close(made(PnPInversion).rectified(x, recorded), x + torch.cat([distance, 0 * distance]), 1e-6)
    apart, plain = (
        made(kind, cross_replace=0, self_replace=0).edit(tiny_model, task) for kind in (PnPInversion, PromptToPrompt)
    )
    close(apart.edits[0].image, plain.edits[0].image, 1e-5)


def test_negative_prompt_inversion_reconstructs_as_without_guidance(tiny_model, task):
    plain = DDIMInversion(Sampler(steps=4)).edit(tiny_model, task)  # up and down under the source prompt, w = 1
    for w in (1.0, 2.0, 7.5):
        result = made(NegativePrompt, guidance_scale=w).edit(tiny_model, task)
        close(result.reconstruction, plain.reconstruction)
        assert result.metrics["reconstruction_error"] == pytest.approx(plain.metrics["reconstruction_error"], rel=1e-3)


def test_null_text_comes_closer_than_plain_guidance(tiny_model, task):
    errors = {}
    for steps in (0, 2, 10):
        method = made(NullText, guidance_scale=7.5, inner_steps=steps, stop_loss=0.0, null_lr=0.2)
        errors[steps] = method.edit(tiny_model, task).metrics["reconstruction_error"]
    plain = made(guidance_scale=7.5).edit(tiny_model, task).metrics["reconstruction_error"]
    assert errors[0] == pytest.approx(plain, rel=1e-4)
    assert errors[10] < errors[2] < errors[0] and errors[10] < 0.7 * plain


def test_null_text_is_optimised_once_and_told_again(tiny_model, task):
    class Kept(Reporter):
        def __init__(self):
            self.states, self.points = {}, []

        def cached(self, key, build):
            found = self.states.setdefault(repr(sorted(key.items())), None) or build()
            self.states[repr(sorted(key.items()))] = found
            return found

        def scalar(self, stage, step, **values):
            self.points.append((stage, step, values))

    reporter = Kept()
    first = made(NullText, 2, inner_steps=2).edit(tiny_model, task, reporter)
    points = reporter.points[:]
    assert [step for _, step, _ in points] == [0, 1] and {stage for stage, *_ in points} == {"null_text"}
    again = made(NullText, 2, inner_steps=2, cross_replace=0.1).edit(
        tiny_model, replace(task, prompt="a dog"), reporter
    )
    assert len(reporter.states) == 1 and len(reporter.points) == 4
    for (_, _, a), (_, _, b) in zip(points, reporter.points[2:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"])
    assert torch.equal(first.reconstruction, again.reconstruction)
    for change in ({"inner_steps": 3}, {"null_lr": 0.1}, {"stop_loss": 1.0}, {"guidance_scale": 3.0}, {"steps": 3}):
        made(NullText, **{"steps": 2, "inner_steps": 2, **change}).edit(tiny_model, task, reporter)
    made(NullText, 2, inner_steps=2).edit(tiny_model, replace(task, source_prompt="a cat"), reporter)
    assert len(reporter.states) == 7


def test_a_null_text_that_is_close_enough_is_left_alone(tiny_model, task):
    before = tiny_model.evaluations
    kept = made(NullText, stop_loss=1e9).edit(tiny_model, task)
    assert tiny_model.evaluations - before == 4 * (1 + 2 + 4)  # up, both texts, guidance of both branches
    close(kept.edits[0].image, made().edit(tiny_model, task).edits[0].image)
    with pytest.raises(InputError, match=r"step 0: lower method\.null_lr"):
        made(NullText, null_lr=1e30, stop_loss=0.0).edit(tiny_model, task)
    for name in ("inner_steps", "null_lr", "stop_loss"):
        with pytest.raises(InputError, match=rf"method\.{name}"):
            made(NullText, **{name: -1})
