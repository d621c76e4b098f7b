"""Imagic, on a tiny random model: every option does what it says, and the model comes back as it was."""

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import TINY, randomised
from torch.nn.utils import parametrize

import models
from data.tasks import EditTask
from errors import InputError
from methods.base import Reporter, check, cosine, generator, minimise, to_image
from methods.imagic import Imagic, denoising_losses
from samplers import Sampler, ddim, guided

FAST = {"embedding_steps": 2, "embedding_lr": 0.1, "tuning_steps": 2, "tuning_lr": 1e-3, "guidance_scale": 2.0}


class Memory(Reporter):
    """Keeps tuned states and what was told, as the runner's reporter does."""

    def __init__(self):
        self.states, self.built, self.curves, self.bars = {}, [], {}, []

    def progress(self, iterable, stage, total=None):
        self.bars.append(stage)
        yield from iterable

    def scalar(self, stage, step, **values):
        for name, value in values.items():
            self.curves.setdefault((stage, name), []).append((step, value))

    def cached(self, key, build):
        name = repr(sorted(key.items()))
        if name not in self.states:
            self.built.append(key["stage"])
            self.states[name] = {n: t.detach().clone() for n, t in build().items()}
        return self.states[name]

    def state(self, stage):
        """The one tuned state of a stage, without its curves."""
        (state,) = [s for name, s in self.states.items() if f"('stage', '{stage}')" in name]
        return {name: tensor for name, tensor in state.items() if not name.startswith("curve/")}


@pytest.fixture(scope="module")
def task():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return EditTask(image, "a red cat")


def imagic(steps=3, sampler=None, **settings):
    return Imagic(sampler or Sampler(steps=steps), **{**FAST, "start": "noise", **settings})


def images(result):
    return torch.stack([edit.image for edit in result.edits])


def tuned_copy(model, memory):
    """The model with the tuned UNet, built here from the stored state."""
    tuned = copy.deepcopy(model)
    parameters = dict(tuned.unet.named_parameters())
    for name, value in memory.state("tuning").items():
        parameters[name].data.copy_(value)
    return tuned


def test_stage_c_is_the_papers_interpolation(tiny_model, task):
    """Every edit equals one sampled here: tuned network, eta e_tgt + (1 - eta) e_opt, embeddings in turn. So eta 1
    is plain sampling of the prompt on the tuned network, and the reconstruction is eta 0."""
    memory = Memory()
    method = imagic(eta=[0, 0.25, 1], num_embeddings=2, num_samples=3)
    result = method.edit(tiny_model, task, memory)
    tuned = tuned_copy(tiny_model, memory)
    e_opt, e_tgt = result.tensors["optimised_embedding"], tiny_model.encode_text([task.prompt])
    assert e_opt.shape == (2, *e_tgt.shape[1:]) and not torch.equal(e_opt[0], e_opt[1])
    trajectory = tiny_model.schedule.trajectory(3)
    assert [(e.settings["eta"], e.settings["sample"]) for e in result.edits] == [
        (eta, i) for eta in (0, 0.25, 1) for i in range(3)
    ]
    for edit in result.edits:
        eta, i = edit.settings["eta"], edit.settings["sample"]
        e = eta * e_tgt + (1 - eta) * e_opt[[i % 2]]
        start = result.tensors["start_latents"][[i]]
        z = ddim.sample(guided(tuned, e, tiny_model.encode_text([""]), 2.0), start, trajectory)
        torch.testing.assert_close(edit.image, tuned.decode_latents(z)[0].clamp(-1, 1), atol=1e-5, rtol=0)
        assert edit.metrics["edit_source_cosine"] == pytest.approx(cosine(z, tiny_model.encode_image(task.image)))
    assert torch.equal(result.reconstruction, result.edits[0].image)
    assert memory.built == ["embedding", "tuning"]  # one tuning for the whole list


def test_a_sample_does_not_depend_on_its_neighbours(tiny_model, task):
    memory = Memory()
    one = images(imagic(eta=0.5).edit(tiny_model, task, memory))
    many = images(imagic(eta=[0.2, 0.5], num_samples=2).edit(tiny_model, task, memory))
    assert torch.equal(one[0], many[2])
    assert not torch.equal(many[2], many[3]) and not torch.equal(many[0], many[2])


def expected_loss(model, x, e):
    with torch.no_grad():
        return float(denoising_losses(model, x, e.expand(32, -1, -1), generator(7, "test")).mean())


def test_both_stages_minimise_the_denoising_loss(tiny_model, task):
    memory = Memory()
    method = imagic(embedding_steps=30, tuning_steps=20, tuning_batch=2)
    result = method.edit(tiny_model, task, memory)
    x, e_opt = result.tensors["source_latent"], result.tensors["optimised_embedding"]
    before = expected_loss(tiny_model, x, result.tensors["target_embedding"])
    after_a = expected_loss(tiny_model, x, e_opt)
    after_b = expected_loss(tuned_copy(tiny_model, memory), x, e_opt)
    assert after_a < before - 5e-4  # a random network hardly listens to its text
    assert after_b < 0.8 * after_a
    assert len(memory.curves["embedding", "loss"]) == 30 and len(memory.curves["tuning", "loss"]) == 20
    assert result.tensors["tuning_loss"].tolist() == pytest.approx([v for _, v in memory.curves["tuning", "loss"]])


def test_no_steps_leave_embedding_and_network_alone(tiny_model, task):
    memory = Memory()
    result = imagic(embedding_steps=0, tuning_steps=0, tune="attention").edit(tiny_model, task, memory)
    assert torch.equal(result.tensors["optimised_embedding"], result.tensors["target_embedding"])
    for name, value in memory.state("tuning").items():
        assert torch.equal(value, tiny_model.unet.get_parameter(name))


def test_random_start_has_the_targets_moments(tiny_model, task):
    result = imagic(embedding_steps=0, tuning_steps=0, embedding_init="random").edit(tiny_model, task)
    e, target = result.tensors["optimised_embedding"], result.tensors["target_embedding"]
    assert abs(cosine(e - e.mean(), target - target.mean())) < 0.15
    assert float(e.std()) == pytest.approx(float(target.std()), rel=0.1)


@pytest.mark.parametrize(
    "setting",
    [
        {"embedding_noise": 0.5},
        {"embedding_optimizer": "sgd"},
        {"embedding_init": "random"},
        {"embedding_lr": 0.2},
        {"embedding_steps": 3},
        {"num_embeddings": 2},
        {"clip_weight": 5.0},
    ],
    ids=str,
)
def test_stage_a_settings_matter_and_tune_again(tiny_model, task, setting):
    memory = Memory()
    plain = imagic().edit(tiny_model, task, memory).tensors["optimised_embedding"]
    other = imagic(**setting).edit(tiny_model, task, memory).tensors["optimised_embedding"]
    assert memory.built == ["embedding", "tuning"] * 2
    assert not torch.equal(plain[0], other[0])


@pytest.mark.parametrize(
    "setting",
    [
        {"tuning_steps": 3},
        {"tuning_lr": 2e-3},
        {"tuning_optimizer": "sgd"},
        {"tuning_optimizer": "adafactor"},
        {"tuning_batch": 2},
        {"tune": "attention"},
    ],
    ids=str,
)
def test_stage_b_settings_matter_and_keep_the_embedding(tiny_model, task, setting):
    memory = Memory()
    plain = images(imagic().edit(tiny_model, task, memory))
    other = images(imagic(**setting).edit(tiny_model, task, memory))
    assert memory.built == ["embedding", "tuning", "tuning"]
    assert not torch.equal(plain, other)


@pytest.mark.parametrize(
    "setting",
    [
        {"eta": 0.3},
        {"guidance_scale": 1.0},
        {"sampler": Sampler("ddpm", steps=3)},
        {"sampler": Sampler(steps=3, eta=1.0)},
        {"steps": 4},
        {"start": "inversion"},
        {"style_eta": 0.1},
    ],
    ids=str,
)
def test_stage_c_settings_matter_and_reuse_the_tuning(tiny_model, task, setting):
    memory = Memory()
    plain = images(imagic().edit(tiny_model, task, memory))
    curves = dict(memory.curves)
    memory.curves, memory.bars = {}, []
    other = images(imagic(**setting).edit(tiny_model, task, memory))
    assert memory.built == ["embedding", "tuning"]
    assert memory.curves == curves  # told again from the kept state
    assert "tuning" not in memory.bars and "editing" in memory.bars
    assert not torch.equal(plain, other)


@pytest.mark.parametrize("tune", ["all", "lora"])
def test_kept_tuning_gives_the_very_same_edits(tiny_model, task, tune):
    method = imagic(tune=tune, decoder_steps=2, num_embeddings=2, num_samples=2)
    memory = Memory()
    fresh = method.edit(tiny_model, task, memory, seed=5)
    kept = method.edit(tiny_model, task, memory, seed=5)
    alone = method.edit(tiny_model, task, seed=5)
    other_seed = method.edit(tiny_model, task, seed=6)
    assert memory.built == ["embedding", "tuning", "decoder"]
    assert torch.equal(images(fresh), images(kept)) and torch.equal(images(fresh), images(alone))
    assert torch.equal(fresh.reconstruction, kept.reconstruction) and fresh.metrics == kept.metrics
    assert not torch.equal(images(fresh), images(other_seed))


def test_attention_only_touches_attention(tiny_model, task):
    memory = Memory()
    imagic(tune="attention").edit(tiny_model, task, memory)
    state = memory.state("tuning")
    attention = {n for n, _ in tiny_model.unet.named_parameters() if ".attn1." in n or ".attn2." in n}
    assert state.keys() == attention
    moved = {n for n, value in state.items() if not torch.equal(value, tiny_model.unet.get_parameter(n))}
    assert moved == attention


def test_all_touches_every_parameter(tiny_model, task):
    memory = Memory()
    imagic(tune="all").edit(tiny_model, task, memory)
    state = memory.state("tuning")
    assert state.keys() == {n for n, _ in tiny_model.unet.named_parameters()}
    assert all(not torch.equal(value, tiny_model.unet.get_parameter(n)) for n, value in state.items())


def test_lora_keeps_only_its_matrices(tiny_model, task):
    memory = Memory()
    lora = images(imagic(tune="lora", lora_rank=2, tuning_lr=0.05).edit(tiny_model, task, memory))
    state = memory.state("tuning")
    assert all(min(value.shape) == 2 and name.endswith((".a", ".b")) for name, value in state.items())
    none = images(imagic(tune="lora", lora_rank=2, tuning_steps=0).edit(tiny_model, task))
    plain = images(imagic(tune="all", tuning_steps=0).edit(tiny_model, task))
    assert not torch.equal(lora, none)
    assert torch.equal(none, plain)  # untrained adapters change nothing


def test_batches_have_the_sizes_asked_for(tiny_model, task, monkeypatch):
    seen = []
    predict = tiny_model.predict_noise
    monkeypatch.setattr(tiny_model, "predict_noise", lambda x, t, c: seen.append(len(x)) or predict(x, t, c))
    imagic(num_embeddings=2, tuning_batch=3, guidance_scale=1.0).edit(tiny_model, task)
    assert seen == [2] * 2 + [3] * 2 + [1] * 6  # stage A, stage B, then edit and reconstruction of 3 steps
    seen.clear()
    imagic().edit(tiny_model, task)
    assert seen == [1] * 4 + [2] * 6  # with guidance both branches go in one call


def test_adafactor_finds_what_adam_finds(tiny_model, task):
    memory = {}
    for optimizer in ("adam", "adafactor"):
        memory[optimizer] = Memory()
        imagic(embedding_steps=0, tuning_steps=15, tuning_batch=2, tuning_optimizer=optimizer).edit(
            tiny_model, task, memory[optimizer]
        )
    e = tiny_model.encode_text([task.prompt])
    x = tiny_model.encode_image(task.image)
    before = expected_loss(tiny_model, x, e)
    adam, adafactor = (expected_loss(tuned_copy(tiny_model, kept), x, e) for kept in memory.values())
    assert adafactor < 0.8 * before and adafactor == pytest.approx(adam, rel=0.3)


@pytest.mark.parametrize("tune", ["all", "attention", "lora"])
def test_gradient_checkpointing_changes_no_result(tiny_model, task, monkeypatch, tune):
    used = []
    predict = tiny_model.predict_noise
    watch = lambda x, t, c: used.append(tiny_model.unet.gradient_checkpointing) or predict(x, t, c)
    plain = images(imagic(tune=tune, tuning_lr=1e-2).edit(tiny_model, task))
    monkeypatch.setattr(tiny_model, "predict_noise", watch)
    saving = images(imagic(tune=tune, tuning_lr=1e-2, gradient_checkpointing=True).edit(tiny_model, task))
    assert all(used) and not tiny_model.unet.gradient_checkpointing
    torch.testing.assert_close(plain, saving, atol=1e-4, rtol=0)


def test_decoder_is_fitted_to_the_image(tiny_model, task):
    memory = Memory()
    settings = {"embedding_steps": 0, "tuning_steps": 0}
    plain = imagic(**settings).edit(tiny_model, task, memory)
    fitted = imagic(**settings, decoder_steps=10, decoder_lr=3e-3).edit(tiny_model, task, memory)
    tuned = copy.deepcopy(tiny_model)
    for name, value in memory.state("decoder").items():
        assert name.startswith("decoder.")
        tuned.autoencoder.get_parameter(name).data.copy_(value)
    x = tiny_model.encode_image(task.image)
    error = [float((m.decode_latents(x) - task.image).abs().mean()) for m in (tiny_model, tuned)]
    assert error[1] < 0.9 * error[0]
    z = fitted.tensors["edited_latents"]
    assert torch.equal(z, plain.tensors["edited_latents"])  # the decoder has no part in diffusion
    torch.testing.assert_close(fitted.edits[0].image, tuned.decode_latents(z)[0].clamp(-1, 1), atol=1e-5, rtol=0)
    loss = [v for _, v in memory.curves["decoder", "loss"]]
    terms = [memory.curves["decoder", name] for name in ("l1", "l2")]
    assert loss[-1] < loss[0]
    assert loss == pytest.approx([a + b for (_, a), (_, b) in zip(*terms, strict=True)], rel=1e-5)


def test_style_mixing_takes_the_second_eta_late(tiny_model, task):
    memory = Memory()

    def edit(**settings):
        return images(imagic(steps=4, **settings).edit(tiny_model, task, memory))

    assert torch.equal(edit(eta=0.6), edit(eta=0.6, style_eta=0.6))
    assert torch.equal(edit(eta=0.6), edit(eta=0.6, style_eta=0.1, style_from=1.0))
    assert torch.equal(edit(eta=0.1), edit(eta=0.6, style_eta=0.1, style_from=0.0))
    result = imagic(steps=4, eta=0.6, style_eta=0.1, style_from=0.75).edit(tiny_model, task, memory)
    tuned, e_opt = tuned_copy(tiny_model, memory), result.tensors["optimised_embedding"]
    e_tgt, null = tiny_model.encode_text([task.prompt]), tiny_model.encode_text([""])
    trajectory, z = tiny_model.schedule.trajectory(4), result.tensors["start_latents"]
    for i, eta in enumerate([0.6, 0.6, 0.6, 0.1]):
        eps = guided(tuned, eta * e_tgt + (1 - eta) * e_opt, null, 2.0)(z, int(trajectory.timesteps[i]))
        z = ddim.step(z, eps, trajectory.alpha_bars[i], trajectory.alpha_bars[i + 1])
    torch.testing.assert_close(result.tensors["edited_latents"], z.detach(), atol=1e-5, rtol=0)
    assert result.edits[0].settings["style_eta"] == 0.1


def test_start_from_the_inverted_image(tiny_model, task):
    memory = Memory()
    result = imagic(eta=0, start="inversion", guidance_scale=1.0, steps=20).edit(tiny_model, task, memory)
    x, e_opt = result.tensors["source_latent"], result.tensors["optimised_embedding"]
    denoise = guided(tuned_copy(tiny_model, memory), e_opt)
    start = ddim.invert(denoise, x, tiny_model.schedule.trajectory(20))
    torch.testing.assert_close(result.tensors["start_latents"], start, atol=1e-5, rtol=0)
    # eta 0 walks back down what it came up; from noise a random network's picture is unrelated to the input
    assert result.metrics["reconstruction_source_cosine"] > 0.8


def test_clip_term_pulls_the_embedding_to_the_image(tiny_model, task):
    ids = tiny_model.text.tokenize([task.prompt])
    features = tiny_model.clip.image_features(task.image)

    def agreement(weight):
        method = imagic(embedding_steps=10, embedding_lr=0.05, tuning_steps=0, clip_weight=weight)
        return cosine(tiny_model.text.pool(method.edit(tiny_model, task).tensors["optimised_embedding"], ids), features)

    assert agreement(10.0) > agreement(0.0) + 0.1


def test_clip_term_needs_a_clip(task):
    without = {name: part for name, part in TINY.items() if name != "vision"}
    with pytest.raises(InputError, match=r"method\.clip_weight"):
        imagic(clip_weight=0.1).edit(models.build(without, seed=0), task)
    penultimate = {**TINY, "text": {**TINY["text"], "hidden_layer": "penultimate"}}
    with pytest.raises(InputError, match="projection"):
        imagic(clip_weight=0.1).edit(models.build(penultimate, seed=0), task)


@pytest.mark.parametrize(
    ("setting", "stage", "step"),
    [
        ({"embedding_lr": 1e30}, "embedding", 1),
        ({"tuning_lr": 1e30}, "tuning", 1),
        ({"decoder_lr": 1e30, "decoder_steps": 3}, "decoder", 1),
    ],
)
def test_a_loss_that_is_no_number_names_stage_and_step(tiny_model, task, setting, stage, step):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    with pytest.raises(InputError, match=f"stage '{stage}' at step {step}: lower method.{next(iter(setting))}"):
        imagic(**setting).edit(tiny_model, task)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


def test_too_many_steps_are_refused_before_tuning(tiny_model, task):
    memory = Memory()
    with pytest.raises(InputError, match="from 1 to 1000"):
        imagic(steps=2000).edit(tiny_model, task, memory)
    assert not memory.bars and not memory.built


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_picture_that_is_not_finite_is_refused(value):
    """Clamped first, an infinite one would pass for white."""

    class Decoder:
        dtype = torch.float32

        def decode_latents(self, z):
            return torch.full((1, 3, 4, 4), value)

    with pytest.raises(InputError, match="NaN or infinite"):
        to_image(Decoder(), torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("tune", ["all", "attention", "lora"])
def test_the_model_comes_back_unchanged(task, tune):
    model = randomised(models.build(TINY, seed=1)).requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = {name: value.data_ptr() for name, value in model.named_parameters()}
    names = [name for name, _ in model.named_parameters()]
    settings = {"tune": tune, "decoder_steps": 2, "gradient_checkpointing": True, "clip_weight": 1.0}
    imagic(**settings, start="inversion", style_eta=0.5, num_embeddings=2, steps=2).edit(model, task)
    after = model.state_dict()
    assert sorted(after) == sorted(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert pointers == {name: value.data_ptr() for name, value in model.named_parameters()}
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_half_precision_tunes_and_stays_half(task):
    model = randomised(models.build(TINY, seed=0)).to(torch.bfloat16)
    memory = Memory()
    half = EditTask(task.image.bfloat16(), task.prompt)
    result = imagic(tuning_steps=2, decoder_steps=1, steps=2).edit(model, half, memory)
    assert all(value.dtype == torch.bfloat16 for value in memory.state("tuning").values())
    assert result.edits[0].image.dtype == torch.float32 and result.edits[0].image.isfinite().all()


def test_minimise_follows_the_optimisers_update_rules():
    def run(optimizer, steps, dtype=torch.float64, lr=0.1):
        p = torch.tensor([2.0], dtype=dtype, requires_grad=True)
        curves = minimise(lambda: {"square": (p**2).sum()}, [p], steps, lr, optimizer, "s", "lr", Reporter())
        return float(p.detach()), curves["loss"].tolist()

    # momentum 0.9: v <- 0.9 v + grad, p <- p - lr v, with grad = 2 p
    p, v, losses = 2.0, 0.0, []
    for _ in range(5):
        losses.append(p * p)
        v = 0.9 * v + 2 * p
        p -= 0.1 * v
    assert run("sgd", 5, torch.float32)[0] == pytest.approx(p, rel=1e-5)
    assert run("sgd", 5, torch.float32)[1] == pytest.approx(losses, rel=1e-5)
    assert run("adam", 1, torch.float32)[0] == pytest.approx(1.9, rel=1e-5)  # Adam's first step is lr long
    # Steps that bfloat16 cannot tell from nothing add up all the same.
    assert run("adam", 40, torch.bfloat16, lr=1e-3)[0] == pytest.approx(1.96, abs=0.01)


def test_generators_are_apart_by_seed_and_stage():
    draws = [torch.randn(4, generator=generator(*key)) for key in [(0, "a"), (0, "b"), (1, "a"), (0, "a", 1)]]
    assert all(not torch.equal(draws[i], draws[j]) for i in range(4) for j in range(i))
    assert torch.equal(draws[0], torch.randn(4, generator=generator(0, "a")))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"eta": 1.2}, "method.eta is 1.2: it must be a number from 0 to 1"),
        ({"eta": [0.5, -0.1]}, "method.eta"),
        ({"eta": []}, "method.eta is an empty list"),
        ({"eta": "much"}, "method.eta is much"),
        ({"eta": None}, "method.eta is None"),
        ({"eta": True}, "method.eta is True"),
        ({"eta": float("nan")}, "method.eta is nan"),
        ({"style_eta": 2}, "method.style_eta"),
        ({"style_from": -0.1}, "method.style_from"),
        ({"embedding_steps": -1}, "method.embedding_steps is -1: it must be a whole number, 0 or more"),
        ({"tuning_steps": 1.5}, "method.tuning_steps"),
        ({"decoder_steps": -1}, "method.decoder_steps"),
        ({"num_embeddings": 0}, "method.num_embeddings is 0: it must be a whole number, 1 or more"),
        ({"tuning_batch": 0}, "method.tuning_batch"),
        ({"lora_rank": 0}, "method.lora_rank"),
        ({"num_samples": 0}, "method.num_samples"),
        ({"embedding_lr": -1e-3}, "method.embedding_lr"),
        ({"tuning_lr": float("inf")}, "method.tuning_lr"),
        ({"decoder_lr": "x"}, "method.decoder_lr"),
        ({"embedding_noise": -1}, "method.embedding_noise"),
        ({"clip_weight": -1}, "method.clip_weight"),
        ({"guidance_scale": -1}, "method.guidance_scale"),
        ({"embedding_optimizer": "lion"}, "method.embedding_optimizer is lion: choose one of adam, sgd"),
        ({"tuning_optimizer": "lion"}, "method.tuning_optimizer"),
        ({"embedding_init": "zero"}, "method.embedding_init"),
        ({"tune": "some"}, "method.tune is some: choose one of all, attention, lora"),
        ({"start": "image"}, "method.start"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(setting, message):
    with pytest.raises(InputError) as error:
        imagic(**setting)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_check_reads_lists_and_bounds():
    class Settings:
        good, bad = [0, 1], [0, 2]

    check(Settings, "good", high=1, many=True)
    with pytest.raises(InputError, match=r"method\.bad is \[0, 2\].* a list of them"):
        check(Settings, "bad", high=1, many=True)
    with pytest.raises(InputError, match=r"method\.good is \[0, 1\]: it must be a number from 0 to 1$"):
        check(Settings, "good", high=1)


def test_stages_are_timed_under_their_names(tiny_model, task):
    class Timed(Reporter):
        names = []

        @contextmanager
        def stage(self, name):
            self.names.append(name)
            yield

    imagic(decoder_steps=1).edit(tiny_model, task, Timed())
    assert Timed.names == ["embedding", "tuning", "decoder", "editing", "reconstruction"]


def test_samples_that_would_all_be_one_picture_are_refused():
    with pytest.raises(InputError, match=r"method\.num_samples is 2, and all would be one picture"):
        imagic(start="inversion", num_samples=2)
    imagic(start="inversion", num_samples=2, num_embeddings=2)
    imagic(start="inversion", num_samples=2, sampler=Sampler(steps=3, eta=0.5))
    imagic(start="inversion", num_samples=2, sampler=Sampler(kind="ddpm", steps=3))
