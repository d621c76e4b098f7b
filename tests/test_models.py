"""The networks by their properties: backends agree, projections are reused, gradients flow, no step waits."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from benchmarks.unet import plain
from errors import InputError
from models.attention import CrossAttention, SelfAttention, attention
from models.device import choose_device, choose_dtype
from models.text import BEGIN, END, UNKNOWN, compact, compact_vocabulary
from models.unet import UNet
from tests.conftest import TINY, normal, randomised, tiny


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 33), st.sampled_from([8, 40, 80])),
    m=st.integers(1, 33),
    case=st.sampled_from([(0.1, torch.float32), (1, torch.float32), (30, torch.float32), (1, torch.bfloat16)]),
)
def test_attention_and_its_gradients_agree_with_float64(sizes, m, case):
    (batch, heads, n, d), (scale, dtype) = sizes, case
    generator = torch.Generator().manual_seed(n * 100 + m)
    draw = lambda length: torch.randn(batch, heads, length, d, generator=generator)
    tensors = [x.to(dtype) for x in (scale * draw(n), draw(m), draw(m), draw(n))]

    def results(backend, kind):
        *leaves, do = (x.to(kind).requires_grad_() for x in tensors)
        out = attention(*leaves, backend) if backend else (leaves[0] @ leaves[1].mT / d**0.5).softmax(-1) @ leaves[2]
        assert out.dtype == kind
        return [x.double() for x in (out, *torch.autograd.grad(out, leaves, do))]

    exact, rounding = results(None, torch.float64), 8 * torch.finfo(dtype).eps * max(1, scale)
    for backend in ("auto", "sdpa", "reference"):
        compared = 1 if backend == "sdpa" or scale > 1 else 4  # PyTorch's own gradients round more, as huge logits do
        for found, expected in zip(results(backend, dtype)[:compared], exact, strict=False):
            assert (found - expected).norm() <= rounding * (1 + expected.norm()), backend


def test_layers_share_their_own_network_s_attention_and_no_other(tiny_model):
    """Every layer asks the hook, which may decline; it is gone afterwards, and a copy of the network never asks it."""
    unet, other, seen = copy.deepcopy(tiny_model.unet), copy.deepcopy(tiny_model.unet), []
    layers = [m for m in unet.modules() if isinstance(m, SelfAttention | CrossAttention)]
    assert all(layer.attention is unet.attention for layer in layers) and other.attention is not unet.attention
    x, context = normal(2, 4, 8, 8).float(), tiny_model.encode_text(["a cat", "a dog"]).states
    plain = unet(x, 3, context)
    with unet.attention.hooked(lambda q, k, v, cross: seen.append((cross, q.shape[-2], k.shape[-2]))):
        assert torch.equal(unet(x, 3, context), plain)
        assert len(seen) == len(layers) and [cross for cross, *_ in seen] == [False, True] * (len(layers) // 2)
        assert all(keys == (context.shape[1] if cross else places) for cross, places, keys in seen)
        other(x, 3, context)
        assert len(seen) == len(layers)
    with unet.attention.hooked(lambda q, k, v, cross: torch.zeros_like(q)):
        assert not torch.equal(unet(x, 3, context), plain)
    with pytest.raises(ZeroDivisionError), unet.attention.hooked(lambda *_: 1 / 0):
        unet(x, 3, context)
    assert unet.attention.hook is None and torch.equal(unet(x, 3, context), plain)


def test_the_unet_as_it_is_commonly_written_is_the_same():
    """The benchmarks time it beside ours."""
    model, x = tiny("sdxl_tiny", dtype=torch.float32), normal(2, 4, 8, 8).float()
    text = model.encode_text(["a cat", "a dog"])
    ours = model.predict(x, 5, text)
    plain(model.unet)
    torch.testing.assert_close(model.predict(x, 5, text), ours, atol=1e-5, rtol=1e-5)
    assert not any("to_kv" in name or "to_qkv" in name for name, _ in model.unet.named_parameters())


def test_compiled_it_is_the_same_and_one_graph_and_runs_uncompiled_with_a_hook():
    sizes = dict(model_channels=32, channel_mult=[1], num_res_blocks=1, num_heads=2, context_dim=16)
    unet, graphs, seen = randomised(UNet(**sizes, attention_levels=[0])), [], []
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(unet, backend=keep, fullgraph=True)
    with torch.no_grad():
        for t in (torch.tensor(3), torch.tensor(700)):
            torch.testing.assert_close(compiled(x, t, context), unet(x, t, context), atol=1e-4, rtol=1e-4)
        with unet.attention.hooked(lambda q, k, v, cross: seen.append(cross)):
            compiled(x, torch.tensor(3), context)
    assert len(graphs) == 1 and seen


def test_autoencoder_shapes_scale_and_posterior(tiny_model):
    x = torch.rand(2, 3, 32, 64) * 2 - 1
    _, logvar = tiny_model.autoencoder.posterior(x)
    z = tiny_model.encode_image(x)
    assert z.shape == (2, 4, 8, 16) and tiny_model.decode_latents(z).shape == x.shape
    draws = torch.stack([tiny_model.encode_image(x, torch.Generator().manual_seed(i)) for i in range(50)])
    spread = (draws.std(0) / ((0.5 * logvar).exp() * tiny_model.autoencoder.scale_factor)).mean()
    assert spread.item() == pytest.approx(1, abs=0.03)
    with pytest.raises(InputError, match="multiples of 8"):
        tiny_model.encode_image(torch.zeros(1, 3, 36, 32))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_predicting_noise_neither_reads_from_the_device_nor_copies_to_it(prediction):
    """On the meta device, which has no values to read; a GPU would make the step wait for either."""
    model = models.build(TINY | {"prediction": prediction}, meta=True)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            devices = {t.device for t in (*args, out) if isinstance(t, torch.Tensor)}
            assert len(devices) <= 1, function  # the schedule looks its numbers up on the CPU
            return out

    x, context = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, 24, 32, device="meta")
    with Watch():
        assert model.predict(x, 500, context).shape == x.shape


def test_the_unknown_token_is_in_no_vocabulary():
    """Training puts the id UNKNOWN in place of tokens. It is the byte of a quotation mark in some runs of signs."""
    import open_clip

    captions = ['the "%" key', "a red heart"]
    assert UNKNOWN in {t for caption in captions for t in open_clip.SimpleTokenizer().encode(caption)}
    vocabulary = compact_vocabulary(captions)
    ids = torch.tensor([UNKNOWN, 0, END, BEGIN, int(vocabulary[0]), 1234])
    last = len(vocabulary) + 1
    assert compact(ids, vocabulary).tolist() == [UNKNOWN, 0, last, last - 1, 2, UNKNOWN]


def test_prompts_become_the_known_ids_and_long_ones_are_cut_with_a_warning():
    """The ids that CLIP's published vocabulary gives this prompt, and the padding of 1.x and of 2.x."""
    cat = [49406, 320, 1125, 539, 320, 2368, 49407]  # a photo of a cat
    for pad, known in (("end", 49407), (0, 0)):
        text = models.text.build_text(width=32, heads=2, layers=1, vocab_size=49410, pad_token=pad)
        assert text.tokenize(["a photo of a cat"]).tolist() == [cat + [known] * 70]
    with pytest.warns(UserWarning, match="cut to 75"):
        assert text.tokenize(["very " * 80 + "long"])[0, -1] == END


def test_compact_text_encoder_names_unknown_words():
    text = models.build(TINY, seed=0, vocabulary=compact_vocabulary(["a red heart"])).text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text(["a red heart"])
    states = []
    for word in ("zebra", "quagga"):
        with pytest.warns(UserWarning, match=word):
            states.append(text([f"a red {word}"]).states[0, :4])
    torch.testing.assert_close(*states)  # unknown words are all alike


def test_pool_is_the_projected_end_state(tiny_model):
    clip = tiny_model.clip
    ids = tiny_model.text.tokenize(["a cat", "two red hearts"])
    hidden = tiny_model.text.encode_tokens(ids)
    expected = torch.stack([hidden[i, (ids[i] == END).nonzero()[0, 0]] for i in range(2)])
    expected = torch.nn.functional.normalize(expected @ tiny_model.text.tower.text_projection, dim=-1)
    torch.testing.assert_close(tiny_model.text.pool(hidden, ids), expected)
    torch.testing.assert_close(clip.text_features(["a cat", "two red hearts"]), expected)
    features = clip.image_features(torch.rand(2, 3, 48, 48) * 2 - 1)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))


def test_a_build_is_its_config_and_seed_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    prints = {models.build(TINY, seed=seed).fingerprint for seed in (0, 0, 1)}
    assert torch.equal(torch.get_rng_state(), before)
    changes = {"unet": {"num_head_channels": 8}, "vae": {"scale_factor": 0.5}, "text": {"pad_token": END}}
    for section, values in (changes | {"schedule": {"kind": "linear"}}).items():
        prints.add(models.build(TINY | {section: TINY[section] | values}, seed=0).fingerprint)
    assert len(prints) == 6


def test_devices_and_precisions(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cpu") == cpu and choose_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")  # the cards in turn, but for one that is named
    names = {"auto": "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "cpu": "cpu"}
    assert {name: str(choose_device(name)) for name in names} == names
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert choose_dtype("auto", cuda) == dtype
    assert choose_dtype("auto", cpu) == torch.float32 and choose_dtype("bfloat16", cuda) == torch.bfloat16
    for able, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("models.device.computes_in", lambda name, device, able=able: able)
        assert choose_dtype("auto", cpu, large=True) == dtype
    for choose, *arguments in ((choose_device, "cuda:2"), (choose_dtype, "bfloat16", cpu)):
        with pytest.raises(InputError, match=f"{arguments[0]}"):
            choose(*arguments)
