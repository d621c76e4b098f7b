"""Each editor beside each inversion: laws, and second implementations that work branch by branch on plain attention."""

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from data.tasks import EditTask
from errors import InputError
from methods.inversion import Inversion, NegativePrompt, PnP, Source
from methods.local_blend import LocalBlend
from methods.masactrl import MasaCtrl
from methods.null_text import NullText
from methods.plug_and_play import PlugAndPlay
from methods.prompt_to_prompt import PromptToPrompt
from methods.words import align
from samplers import Conditioning, Sampler, ddim, guided
from tests.conftest import TINY, close, randomised

UNET = {"model_channels": 32, "channel_mult": [1, 2, 4, 4], "num_heads": 4, "num_res_blocks": 2, "context_dim": 32}
VAE = TINY["vae"] | {"ch_mult": [1, 1, 1], "patch": 2}  # latents of an eighth, as in Stable Diffusion
SD1 = {**TINY, "unet": UNET, "vae": VAE, "schedule": {}, "prediction": "epsilon", "image_size": 64}
STEPS, W = 5, 3.0
EDITORS = {
    "prompt_to_prompt": partial(PromptToPrompt, words="refine", cross_replace=0.4, self_replace=0.6),
    "masactrl": partial(MasaCtrl, start_step=1, start_layer=3),
    "plug_and_play": partial(PlugAndPlay, feature_share=0.8, attention_share=0.5),
}
OFF = {
    "prompt_to_prompt": {"cross_replace": 0, "self_replace": 0},
    "masactrl": {"start_step": STEPS},
    "plug_and_play": {"feature_share": 0, "attention_share": 0},
}
INVERSIONS = {"ddim": Inversion, "null_text": partial(NullText, inner_steps=1), "negative_prompt": NegativePrompt}
INVERSIONS["pnp"] = PnP
PAIRS = [(editor, inversion) for editor in EDITORS for inversion in INVERSIONS]


def made(editor, inversion, w=W, **settings):
    return EDITORS[editor](Sampler(steps=STEPS, offset=0), INVERSIONS[inversion](), w, **settings)


@pytest.fixture(scope="module")
def sd1():
    """A small random Stable Diffusion 1.x: four levels, 16 self-attention layers. Its sensitivity to text is raised."""
    model = randomised(models.build(SD1, seed=0)).double()
    for name, layer in model.unet.named_modules():
        if name.endswith(("attn1.to_qkv", "attn2.to_q")):
            layer.weight.mul_(1.5 if "attn1" in name else 5)
    model.unet.attention.backend = "reference"
    return model


def photo(height=64, width=192):
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return EditTask(image, "a red dog on a bench", "a cat on a bench", negative_prompt="blurry")


@pytest.mark.parametrize(("editor", "inversion"), PAIRS)
def test_an_editor_switched_off_samples_plainly_from_the_inverted_latent(tiny_model, task, edit, editor, inversion):
    method = made(editor, inversion)
    vars(method).update(OFF[editor])  # past the checks: MasaCtrl that edits nothing is refused
    ((_, latent, _),), _, run = edit(method, tiny_model, task)
    trajectory, null = method.sampler.trajectory(tiny_model.schedule), ""
    if (editor, inversion) == ("prompt_to_prompt", "negative_prompt"):
        null = task.source_prompt
    if inversion != "null_text" or editor == "plug_and_play":
        denoise = guided(tiny_model, task.prompt, W, null)
        close(latent, ddim.sample(denoise, run.tensors["inverted_latent"], trajectory))
    with pytest.raises(InputError, match="start_layer"):  # there are 4
        edit(made("masactrl", inversion, start_layer=4), tiny_model, task)
    ((_, edited, _),), _, _ = edit(made(editor, inversion), tiny_model, task)
    assert (edited - latent).abs().max() > 1e-4


@pytest.mark.parametrize(("editor", "inversion"), PAIRS)
def test_without_guidance_the_null_texts_have_no_effect(tiny_model, task, edit, editor, inversion):
    ((_, plain, _),), _, _ = edit(made(editor, "ddim", 1.0), tiny_model, task)
    of_pair = replace(task, negative_prompt="blurry")
    ((_, latent, _),), (again, _), run = edit(made(editor, inversion, 1.0), tiny_model, of_pair)
    if inversion == "pnp":
        assert torch.equal(again, run.tensors["source_latent"])
    else:
        close(latent, plain)


class OnPath(PnP):
    """PnP inversion of a picture that guided sampling reaches exactly."""

    def invert(self, model, task, z, trajectory, guidance_scale, run):
        text, null = (model.encode_text([prompt]) for prompt in (task.source_prompt, ""))
        latents = [torch.randn(z.shape, generator=run.noise("x_T")).to(z)]
        down = guided(model, text, guidance_scale, null)
        ddim.sample(down, latents[0], trajectory, callback=lambda i, x: latents.append(x))
        path = ddim.Inversion(torch.stack(latents), torch.stack(latents[1:]), trajectory.timesteps)
        return Source(trajectory, path, text, [null], rectified=True)


@pytest.mark.parametrize(("editor", "inversion"), PAIRS)
def test_identical_prompts_give_the_source_branch(tiny_model, task, edit, editor, inversion):
    same = task.source_prompt if editor == "prompt_to_prompt" else ""
    method = made(editor, inversion)
    if inversion == "pnp":  # else the source branch is corrected and the target left behind
        method = replace(method, inversion=OnPath())
    if (editor, inversion) == ("plug_and_play", "null_text"):  # its null texts serve the source branch alone
        method = replace(method, guidance_scale=1.0)
    ((_, latent, _),), (again, _), _ = edit(method, tiny_model, replace(task, prompt=same, negative_prompt=""))
    close(latent, again)


class Net:
    """A network whose calls record q, k and v of all layers, and the features of one block, and may replace them."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x, t, text, attention=None, features=None):
        self.layers, self.features = [], None
        conv = self.model.unet.output_blocks[4][0].conv2  # the second block at the second level on the way up

        def hook(q, k, v, cross):
            self.layers.append((q, k, v, cross))
            weights = ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1)
            return weights @ v if attention is None else attention(len(self.layers) - 1, weights, q, k, v, cross)

        def seen(module, inputs, out):
            self.features = out
            return features

        handle = conv.register_forward_hook(seen)
        self.model.unet.attention.hook = hook
        try:
            return self.model.predict(x, t, text)
        finally:
            self.model.unet.attention.hook = None
            handle.remove()


def second(model, task, inversion, source_prompt, branches, after=lambda i, s, x: x, plain=False):
    """Invert under the source prompt; then step the source and, by `branches`, the target. Returns the final target.
    `plain`: the source has no guidance but that of null texts, and the target leads away from the negative prompt."""
    a = model.schedule.alpha_bars.sqrt()
    s = (1 - model.schedule.alpha_bars).sqrt()
    timesteps = [1000 // STEPS * i for i in range(STEPS)]
    levels = [0, *timesteps]  # Stable Diffusion ends on alpha_bar_0, and with offset 0 the lowest step stays there
    down = lambda x, eps: a[low] * (x - s[t] * eps) / a[t] + s[low] * eps
    net, prompts = Net(model), model.encode_text([source_prompt, task.prompt, "blurry", ""])
    text, prompt, away, empty = (prompts[k] for k in range(4))
    path = [model.encode_image(task.image).double()]
    for t, low in zip(timesteps, levels, strict=False):
        eps = net(path[-1], t, text)
        path.append(a[t] * (path[-1] - s[low] * eps) / a[low] + s[t] * eps)
    null = text if inversion == "negative_prompt" else empty if plain else away
    w, z, x = 1.0 if plain and inversion != "null_text" else W, path[-1], path[-1]
    for i, t in enumerate(timesteps[::-1]):
        low = levels[-2 - i]
        eps = net(z, t, text)
        of_source = net.layers, net.features
        if inversion == "null_text":  # one step of Adam: as long as its rate, wherever there is a gradient
            states = null.states.requires_grad_()
            with torch.enable_grad():
                of_null = net(z, t, Conditioning(states))
                error = (path[-2 - i] - down(z, of_null + W * (eps - of_null))).square()
            (g,) = torch.autograd.grad(error.sum(), states)
            move = 1e-2 * (1 - i / (2 * STEPS)) * g / (g.abs() + 1e-8) * (error.mean() >= 1e-5 + 2e-5 * i)
            null = Conditioning((states - move).detach())
        of_null = net(z, t, null)
        changes = branches(i, [(net.layers, net.features), of_source])
        low_z = down(z, of_null + w * (eps - of_null))
        of_null, of_text = net(x, t, away if plain else null, *changes[0]), net(x, t, prompt, *changes[1])
        x = down(x, of_null + W * (of_text - of_null))
        z = path[-2 - i] if inversion == "pnp" else low_z
        x = after(i, z, x)
    return x


@pytest.mark.parametrize("inversion", INVERSIONS)
def test_masactrl(sd1, edit, inversion):
    """Queries of the target, keys and values of the source's same half, from step 2 and the eleventh layer of 16 on."""

    def branches(i, halves):
        def mutual(layers, n, weights, q, k, v, cross):
            if cross or i < 2 or n < 2 * 10:  # self- and cross-attention take turns
                return weights @ v
            _, k, v, _ = layers[n]
            return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v

        return [(partial(mutual, layers),) for layers, _ in halves]

    wanted = second(sd1, photo(), inversion, "", branches)
    method = made("masactrl", inversion, start_step=2, start_layer=10)
    ((_, latent, _),), _, _ = edit(method, sd1, photo())
    close(latent, wanted)


@pytest.mark.parametrize(("inversion", "prompted"), [*((name, True) for name in INVERSIONS), ("ddim", False)])
def test_plug_and_play(sd1, edit, inversion, prompted):
    """Features in steps 0 to 3 of 5, queries and keys in 0 to 1, from layer 9 of 16 on. No guidance of the source."""

    def branches(i, halves):
        layers, features = halves[0]

        def injected(n, weights, q, k, v, cross):
            if cross or i >= 2 or n < 2 * 8:
                return weights @ v
            q, k, _, _ = layers[n]
            return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v

        return [(injected, features if i < 4 else None)] * 2

    task = photo()
    wanted = second(sd1, task, inversion, task.source_prompt if prompted else "", branches, plain=True)
    method = made("plug_and_play", inversion, source_prompted=prompted, attention_share=0.4)
    ((_, latent, _),), _, _ = edit(method, sd1, task)
    close(latent, wanted)


BLENDS = [(name, "cat dog", (64, 192)) for name in INVERSIONS]
BLENDS += [("ddim", "", (64, 192)), ("pnp", "cat dog", (192, 64))]


@pytest.mark.parametrize(("inversion", "blend", "shape"), BLENDS)
def test_prompt_to_prompt(sd1, edit, inversion, blend, shape):
    """Refine, by a map of tokens that is written out, and with words to blend LocalBlend from the second step on."""
    #       begin a red dog on a bench end, and padding at its place
    taken = [0, 1, None, None, 3, 4, 5, 6, *range(8, 24)]
    cat, dog = 2, 3
    task, latent_sides = replace(photo(*shape), blend_word=blend), [side // 8 for side in shape]
    sides = [side // 4 for side in latent_sides]
    partly, heat = [], {"source": torch.zeros(sides), "target": torch.zeros(sides)}

    def collect(name, maps, word):
        if maps.shape[-2] == sides[0] * sides[1]:
            heat[name] += maps[0, :, :, word].mean(0).reshape(sides)

    def branches(i, halves):
        layers = halves[1][0]
        for q, k, _, cross in layers:
            if cross:
                collect("source", (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1), cat)

        def edited(n, weights, q, k, v, cross):
            q, k, _, _ = layers[n]
            of_source = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
            if cross and i < 2:
                columns = [weights[..., m] if j is None else of_source[..., j] for m, j in enumerate(taken)]
                weights = torch.stack(columns, -1)
                weights[..., dog] *= 2 if blend else 1
            if not cross and i < 3:
                weights = of_source
            if cross:
                collect("target", weights, dog)
            return weights @ v

        return (), (edited,)

    def after(i, z, x):
        if not blend or i < 1:
            return x
        inside = torch.zeros(latent_sides, dtype=torch.bool)
        for maps in heat.values():
            pooled = torch.stack([
                torch.stack([maps[max(0, r - 1) : r + 2, max(0, c - 1) : c + 2].max() for c in range(sides[1])])
                for r in range(sides[0])
            ])  # fmt: skip
            large = pooled.repeat_interleave(4, 0).repeat_interleave(4, 1)
            inside |= large / large.max() > 0.999
        partly.append(0 < inside.sum() < inside.numel())
        return torch.where(inside, x, z)

    wanted = second(sd1, task, inversion, task.source_prompt, branches, after)
    method = made("prompt_to_prompt", inversion, blend_threshold=0.999)
    assert any(partly) == bool(blend)
    ((_, latent, _),), _, _ = edit(method, sd1, task)
    close(latent, wanted)


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_an_alignment_pairs_equal_tokens_and_as_many_as_can_be(a, b):
    pairs = align(list(a), list(b))
    assert all(a[i] == b[j] for i, j in pairs)
    assert all(i < k and j < m for (i, j), (k, m) in pairwise(pairs))

    def longest(a, b):
        if not a or not b:
            return 0
        return max(longest(a[1:], b), longest(a, b[1:]), (a[0] == b[0]) + longest(a[1:], b[1:]) if a[0] == b[0] else 0)

    assert len(pairs) == longest(a, b)
    assert align(list("ab"), list("aab")) == [(0, 0), (1, 2)]  # of two best, the first


def test_local_blend_by_hand():
    """Maps of 2 x 3 places for latents of 4 x 6: source and target look at their words in opposite corners."""
    maps, x = torch.zeros(2, 2, 6, 3), torch.stack([torch.zeros(1, 4, 6), torch.ones(1, 4, 6)])
    maps[0, :, 0, 1], maps[0, 0, 2, 0], maps[1, 1, 5, 2] = 0.5, 9.0, 0.2
    left = torch.zeros(4, 6)
    left[:, :4] = 1  # place (0, 0) and its neighbours, twice as large; a word that is missing adds nothing
    for of_target, inside in ((1.0, torch.ones(4, 6)), (0.0, left)):  # both halves, joined, reach everywhere
        blend = LocalBlend(torch.tensor([[0, 1.0, 0], [0, 0, of_target]]), (2, 3), 1, 0.3)
        blend.collect(maps)
        blend.collect(maps)
        assert blend.collects(6) and not blend.collects(4) and torch.equal(blend(0, x), x)
        assert torch.equal(blend(1, x)[1, 0], inside) and not blend(1, x)[0].any()


def test_words_to_blend(tiny_model, task, edit):
    method = made("prompt_to_prompt", "pnp")
    for wrong in ("cat", "cat dog heart", "bus tree"):
        with pytest.raises(InputError, match="blend_word"):
            edit(method, tiny_model, replace(task, blend_word=wrong))
    with pytest.warns(UserWarning, match="tree"):
        edit(method, tiny_model, replace(task, blend_word="cat tree"))
    own = replace(method, blend_word="cat heart", blend_threshold=1.0)  # a place above the strongest: none
    ((_, latent, _),), (again, _), _ = edit(own, tiny_model, task)
    assert torch.equal(latent, again)
    ((_, latent, _),), _, _ = edit(replace(own, blend_start=1.0, blend_weight=1.0), tiny_model, task)
    close(latent, edit(method, tiny_model, task)[0][0][1], 1e-5)
