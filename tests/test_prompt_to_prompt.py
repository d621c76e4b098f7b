"""Prompt-to-Prompt and the inversions beside which it edits: words, maps, and the way back of each source branch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import InputError
from methods.inversion import Inversion
from methods.null_text import NullText
from methods.prompt_to_prompt import PromptToPrompt
from methods.words import tokenise, word_factors, word_map
from samplers import Sampler
from tests.conftest import close
from tests.test_imagic import Memory

BEGIN = 1  # the first word's place
WORDS = ["a", "red", "blue", "cat", "dog", "construction", "hippopotamus", "runs", "fast"]
phrases = st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join)


def made(inversion=None, steps=4, **settings):
    return PromptToPrompt(Sampler(steps=steps), inversion or Inversion(), **settings)


def mapped(model, source, target, words):
    return word_map(tokenise(model.text, source), tokenise(model.text, target), words)


@settings(max_examples=60, deadline=None)
@given(phrases, phrases, st.sampled_from(["replace", "refine"]))
def test_a_token_takes_maps_or_keeps_its_own_and_no_attention_is_made(tiny_model, a, b, mode):
    takes, own = mapped(tiny_model, a, b, mode)
    ids = tiny_model.text.tokenize([a, b])
    assert torch.equal(takes.any(dim=0), own == 0)
    assert (takes.sum(dim=1) <= 1 + 1e-6).all()  # a source token's attention is handed on once, or lost
    assert takes[0, 0] == 1 and takes[ids[0].argmax(), ids[1].argmax()] == 1  # begin and end
    if mode == "refine":
        i, j = takes.nonzero().T
        assert torch.equal(ids[0][i], ids[1][j]) and (i.diff() > 0).all() and (j.diff() > 0).all()
    same, own = mapped(tiny_model, a, a, mode)
    assert torch.equal(same, torch.eye(24)) and not own.any()


def test_word_swap_gives_each_word_its_counterparts_maps(tiny_model):
    assert tokenise(tiny_model.text, "a hippopotamus").words[:7] == [-1, 0, 1, 1, 1, -1, -1]
    takes, own = mapped(tiny_model, "a red cat runs", "a blue hippopotamus runs", "replace")
    assert not own[:7].any()
    assert takes[BEGIN + 1, BEGIN + 1] == 1  # blue from red, and not from cat
    close(takes[BEGIN + 2, BEGIN + 2 : BEGIN + 5], torch.full((3,), 1 / 3), 1e-6)
    assert takes[BEGIN + 3, BEGIN + 5] == 1  # runs
    takes, own = mapped(tiny_model, "a hippopotamus runs", "a cat runs", "replace")
    assert torch.equal(takes[BEGIN + 1 : BEGIN + 4, BEGIN + 1], torch.ones(3)) and takes[BEGIN + 4, BEGIN + 2] == 1
    for mode in ("replace", "refine"):  # new words keep their own
        takes, own = mapped(tiny_model, "a cat", "a red cat runs", mode)
        assert own.nonzero().flatten().tolist() == [BEGIN + 1, BEGIN + 3]
        assert takes[BEGIN + 1, BEGIN + 2] == 1 and takes[BEGIN + 2, BEGIN + 4] == 1  # cat, end
        assert torch.equal(takes[BEGIN + 5 :, BEGIN + 5 :], torch.eye(18))  # padding, at its place


def test_reweighting_finds_words_and_phrases(tiny_model):
    text, prompt = tiny_model.text, tokenise(tiny_model.text, "a red hippopotamus, on a red bus")
    factors = word_factors(text, prompt, {"Red": 2, "hippopotamus": -1, "a": 0})
    assert factors[:10].tolist() == [1, 0, 2, -1, -1, -1, 1, 1, 0, 2]
    assert word_factors(text, prompt, {"red bus": 3})[8:13].tolist() == [1, 3, 3, 1, 1]
    for missing in ("blue", ""):
        with pytest.raises(InputError, match="reweight"):
            word_factors(text, prompt, {missing: 2})


def test_large_self_attention_is_left_alone():
    large = torch.zeros(2, 1, 32**2 + 1, 8)
    for places, left_alone in ((0, True), (1, False)):
        assert (made().edited(0.0, torch.zeros(3, 1))(*[large[:, :, places:]] * 3, False) is None) == left_alone


def test_reweighting_changes_the_edit_and_not_the_reconstruction(tiny_model, task, edit):
    results = [edit(made(reweight=r), tiny_model, task)[:2] for r in (None, {"heart": 1}, {"heart": 4})]
    (plain, same, more), again = ([edits[0][1] for edits, _ in results]), [latent for _, (latent, _) in results]
    assert torch.equal(plain, same) and torch.equal(again[0], again[2])
    assert (plain - more).abs().max() > 1e-4


def test_null_text_comes_closer_than_plain_guidance(tiny_model, task, edit):
    def error(inversion):
        return edit(made(inversion, guidance_scale=7.5), tiny_model, task)[2].metrics["reconstruction_error"]

    plain, *errors = error(Inversion()), *(error(NullText(0, n, null_lr=0.2, stop_loss=0.0)) for n in (0, 2, 10))
    assert errors[0] == pytest.approx(plain, rel=1e-4)
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.8 * plain


def test_null_text_is_optimised_once_for_all_edits_of_a_picture(tiny_model, task, edit):
    run = Memory()

    def again(task=task, steps=2, scale=2.0, replaced=0.8, **settings):
        method = made(NullText(**{"inner_steps": 2, **settings}), steps, guidance_scale=scale, cross_replace=replaced)
        return edit(method, tiny_model, task, run=run)[1][0]

    first = again()
    assert torch.equal(first, again(replace(task, prompt="a dog"), replaced=0.1)) and run.built == ["null_text"]
    curve = run.curves["null_text", "loss"]
    assert curve[:2] == pytest.approx(curve[2:])  # drawn again
    for change in ({"inner_steps": 3}, {"null_lr": 0.1}, {"stop_loss": 1.0}, {"scale": 3.0}, {"steps": 3}):
        again(**change)
    again(replace(task, source_prompt="a dog"))
    assert len(run.built) == 7
