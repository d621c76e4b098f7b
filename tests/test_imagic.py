"""Imagic, on a tiny random model: the paper's equations, each option, and the model as it was before."""

import copy

import pytest
import torch

import models
from errors import InputError
from methods import lora
from methods.base import RECONSTRUCTION, Run, cosine, perform
from methods.imagic import Imagic, denoising_losses
from samplers import Conditioning, Sampler, ddim, guided, noise_like
from tests.conftest import TINY, WITHOUT_CLIP, latents, randomised

NO_TUNING = {"embedding_steps": 0, "tuning_steps": 0}
STAGES = ["embedding", "tuning", "decoder"]


class Memory(Run):
    """Stores tuned states, curves and the names of stages, as the runner does."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.states, self.built, self.curves = {}, [], {}

    def scalar(self, stage, step, **values):
        for name, value in values.items():
            self.curves.setdefault((stage, name), []).append(value)

    def cached(self, stage, key, build):
        name = repr((stage, sorted(key.items())))
        if name not in self.states:
            self.built.append(stage)
            self.states[name] = {n: t.detach().clone() for n, t in build().items()}
        return self.states[name]

    def state(self, stage):
        """The one tuned state of a stage, without its curves."""
        (state,) = [state for name, state in self.states.items() if name.startswith(f"('{stage}'")]
        return {name: tensor for name, tensor in state.items() if not name.startswith("curve/")}


def imagic(steps=3, sampler=None, **settings):
    fast = {"embedding_steps": 2, "embedding_lr": 0.1, "tuning_steps": 2, "tuning_lr": 1e-3}
    return Imagic(sampler or Sampler(steps=steps), **fast | settings)


@torch.no_grad()
def tuned_copy(model, run, part="unet", stage="tuning"):
    """The model with the tuned weights of a run, put in place here."""
    tuned = copy.deepcopy(model)
    for name, value in run.state(stage).items():
        getattr(tuned, part).get_parameter(name).copy_(value)
    return tuned


def expected_loss(model, z, states):
    rows = Conditioning(states.expand(32, -1, -1))
    return float(denoising_losses(model, z, rows, Run(7).noise("test")).mean())


@torch.no_grad()
def test_edits_are_the_papers_interpolation(tiny_model, task, edit):
    """Every edit equals one sampled here: tuned network, eta e_tgt + (1 - eta) e_opt, embeddings in turn. So eta 1
    is plain sampling of the prompt on the tuned network, and the reconstruction is eta 0."""
    method = imagic(eta=[0, 0.25, 1], num_embeddings=2, num_samples=2)
    edits, reconstruction, run = edit(method, tiny_model, task, run=Memory())
    tuned, target = tuned_copy(tiny_model, run), tiny_model.encode_text([task.prompt])
    e_opt = run.tensors["optimised_embedding"]
    assert e_opt.shape == (2, *target.states.shape[1:]) and not torch.equal(e_opt[0], e_opt[1])
    trajectory, source = tiny_model.schedule.trajectory(3), tiny_model.encode_image(task.image).double()
    assert [settings for settings, _, _ in edits] == [{"eta": eta, "sample": i} for eta in (0, 0.25, 1) for i in (0, 1)]
    for settings, latent, picture in edits:
        eta, i = settings["eta"], settings["sample"]
        e = task.prompt if eta == 1 else Conditioning(eta * target.states + (1 - eta) * e_opt[[i]])
        x = noise_like(source, run.noise("start", i))
        z = ddim.sample(guided(tuned, e, 2.0), x, trajectory)
        torch.testing.assert_close(latent, z, atol=1e-5, rtol=0)
        torch.testing.assert_close(picture, tuned.decode_latents(z)[0].clamp(-1, 1), atol=1e-5, rtol=0)
    assert torch.equal(reconstruction[0], edits[0][1])
    assert run.built == ["embedding", "tuning"]  # one tuning for the whole list
    alone = edit(imagic(eta=0.25, num_embeddings=2), tiny_model, task)
    assert torch.equal(latents(alone), edits[2][1])  # a sample does not depend on its neighbours


@torch.no_grad()
def test_both_optimisations_reduce_the_denoising_loss(tiny_model, task, edit):
    run, z = Memory(), tiny_model.encode_image(task.image).double()
    edit(imagic(embedding_steps=30, tuning_steps=20, tuning_batch=2), tiny_model, task, run=run)
    target, e_opt = run.tensors["target_embedding"], run.tensors["optimised_embedding"]
    after_a = expected_loss(tiny_model, z, e_opt)
    assert after_a < expected_loss(tiny_model, z, target) - 5e-4  # a random network hardly listens to its text
    assert expected_loss(tuned_copy(tiny_model, run), z, e_opt) < 0.8 * after_a
    assert run.metrics["embedding_cosine"] == pytest.approx(cosine(e_opt, target))
    curve = run.curves["tuning", "loss"]
    assert len(curve) == 20 and run.metrics["tuning_loss"] == pytest.approx(sum(curve[-2:]) / 2)


def test_the_losses_written_out_by_hand(tiny_model, task, edit):
    """t, then eps, then the mean square of the error, of the first step of each stage."""
    run, z = Memory(), tiny_model.encode_image(task.image).double()
    edit(imagic(embedding_steps=1, tuning_steps=1), tiny_model, task, run=run)
    for stage, embedding in (("embedding", "target_embedding"), ("tuning", "optimised_embedding")):
        noise = run.noise(stage)
        if stage == "tuning":
            torch.randint(1, (1,), generator=noise)  # which of the embeddings
        t = int(torch.randint(1000, (1,), generator=noise))
        eps, alpha_bar = torch.randn(z.shape, generator=noise), tiny_model.schedule.alpha_bars[t]
        x = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * eps
        error = tiny_model.predict(x, t, Conditioning(run.tensors[embedding])) - eps
        assert run.curves[stage, "loss"] == pytest.approx([float(error.square().mean())], rel=1e-5)


OF_STAGE = {
    "embedding": [{"embedding_noise": 0.5}, {"embedding_init": "random"}, {"embedding_optimizer": "adafactor"}]
    + [{"num_embeddings": 2}, {"clip_weight": 5}],
    "tuning": [{"tuning_batch": 2}, {"tuning_optimizer": "adafactor"}, {"tune": "attention"}, {"tune": "lora"}],
    "editing": [{"guidance_scale": 1.0}, {"sampler": Sampler(steps=3, eta=1.0)}],
}


@pytest.mark.parametrize(("stage", "setting"), [(stage, s) for stage, all in OF_STAGE.items() for s in all], ids=str)
def test_a_setting_matters_and_only_its_stage_and_later_ones_run_again(tiny_model, task, edit, stage, setting):
    run = Memory()
    plain = latents(edit(imagic(), tiny_model, task, run=run))
    curves, run.curves = run.curves, {}
    other = latents(edit(imagic(**setting), tiny_model, task, run=run))
    again = {"embedding": ["embedding", "tuning"], "tuning": ["tuning"], "editing": []}[stage]
    assert run.built == ["embedding", "tuning", *again]
    assert not torch.equal(plain, other)
    assert (run.curves == curves) == (stage == "editing")  # a stored state's curves are drawn again


@pytest.mark.parametrize("tune", ["all", "lora"])
def test_a_cached_state_gives_the_same_bits_and_gradient_checkpointing_the_same_edit(tiny_model, task, edit, tune):
    settings, run = {"tune": tune, "decoder_steps": 2, "num_embeddings": 2, "num_samples": 2}, Memory(5)
    fresh, cached = (edit(imagic(**settings), tiny_model, task, run=run)[0] for _ in range(2))
    assert run.built == ["embedding", "tuning", "decoder"]
    assert all(torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(fresh, cached, strict=True))
    saving = edit(imagic(**settings, gradient_checkpointing=True), tiny_model, task, seed=5)
    torch.testing.assert_close(latents(saving), latents([fresh]), atol=1e-4, rtol=0)


def test_the_weights_that_move_are_those_named(tiny_model, task, edit):
    def moved(**settings):
        return edit(imagic(**settings), tiny_model, task, run=Memory())[2].state("tuning")

    names = [name for name, _ in tiny_model.unet.named_parameters()]
    assert sorted(moved()) == sorted(names) and sorted(moved(tune="attention")) == sorted(lora.in_attention(names))
    matrices = moved(tune="lora", lora_rank=2, lora_lr=0.05)
    assert all(2 in m.shape for m in matrices.values())
    assert max(float(m.abs().max()) for n, m in matrices.items() if n.endswith(".b")) > 0.05  # two steps of lora_lr


def test_the_decoder_is_fitted_to_the_image(tiny_model, task, edit):
    plain = edit(imagic(**NO_TUNING), tiny_model, task)
    fitted = edit(imagic(**NO_TUNING, decoder_steps=10, decoder_lr=3e-3), tiny_model, task, run=Memory())
    z = tiny_model.encode_image(task.image)
    tuned = tuned_copy(tiny_model, fitted[2], "autoencoder", "decoder")
    before, after = (float((m.decode_latents(z) - task.image).abs().mean()) for m in (tiny_model, tuned))
    assert after < 0.9 * before
    assert torch.equal(latents(plain), latents(fitted))  # the decoder has no part in diffusion
    torch.testing.assert_close(fitted[0][0][2], tuned.decode_latents(latents(fitted))[0].clamp(-1, 1))


def test_style_mixing_takes_the_second_eta_late(tiny_model, task, edit):
    method = imagic(steps=4, eta=0.6, style_eta=0.1, style_from=0.75, tuning_steps=0)
    edits, _, run = edit(method, tiny_model, task)
    target, e_opt = run.tensors["target_embedding"], run.tensors["optimised_embedding"]
    trajectory, z = tiny_model.schedule.trajectory(4), run.tensors["start_latents"]
    for i, eta in enumerate([0.6, 0.6, 0.6, 0.1]):
        denoise = guided(tiny_model, Conditioning(eta * target + (1 - eta) * e_opt), 2.0)
        z = trajectory.step(z, denoise(z, int(trajectory.timesteps[i])), i, i + 1)
    torch.testing.assert_close(latents([edits]), z, atol=1e-6, rtol=0)
    assert edits[0][0]["style_eta"] == 0.1


def test_the_clip_term_pulls_the_embedding_to_the_image(tiny_model, task, edit):
    ids, seen = tiny_model.text.tokenize([task.prompt]), tiny_model.clip.image_features(task.image)

    def agreement(weight):
        method = imagic(embedding_steps=10, embedding_lr=0.05, tuning_steps=0, clip_weight=weight)
        return cosine(tiny_model.text.pool(edit(method, tiny_model, task)[2].tensors["optimised_embedding"], ids), seen)

    assert agreement(10.0) > agreement(0.0) + 0.1
    with pytest.raises(InputError, match="clip_weight"):
        edit(imagic(clip_weight=0.1), models.build(WITHOUT_CLIP, seed=0), task)


@pytest.mark.parametrize("tune", ["all", "lora"])
@pytest.mark.parametrize("failing", [None, "midway", *STAGES])
def test_the_model_comes_back_unchanged_also_after_an_error(task, tune, failing):
    """It fails by a learning rate that makes the loss infinite, or by a caller that stops after the first edit."""
    model = randomised(models.build(TINY, seed=1)).requires_grad_(True)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    settings = {"tune": tune, "decoder_steps": 2, "gradient_checkpointing": True, "clip_weight": 1.0, "eta": [0, 1]}
    method = imagic(**settings, steps=2)
    if failing in STAGES:  # beyond the setting's range
        setattr(method, "lora_lr" if (failing, tune) == ("tuning", "lora") else f"{failing}_lr", 1e30)
    results = perform(method, model, task, Run())
    if failing == "midway":
        next(results)
        results.close()
    elif failing:
        with pytest.raises(InputError, match=f"{failing}.* step 1"):
            list(results)
    else:
        assert [settings for settings, _, _ in results][-1] == RECONSTRUCTION
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(v.data_ptr() == before[n][0] and torch.equal(v, before[n][1]) for n, v in after.items())
    assert all(p.requires_grad and p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules()) and not model.unet.gradient_checkpointing
    assert torch.is_grad_enabled()
