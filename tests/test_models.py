"""The networks by their properties: backends agree, projections are reused, gradients flow, files come back whole."""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from errors import InputError
from models.attention import attention, attention_map, use_backend
from models.text import BEGIN, END, UNKNOWN, compact, compact_vocabulary
from models.unet import UNet, timestep_embedding


def latents(model, batch, seed=0):
    return torch.randn(batch, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    n=st.integers(1, 33),
    m=st.integers(1, 33),
    d=st.sampled_from([8, 40, 80]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_attention_backends_agree_with_float64(batch, heads, n, m, d, scale):
    generator = torch.Generator().manual_seed(n * 100 + m)
    q, k, v = (torch.randn(batch, heads, length, d, generator=generator) * scale for length in (n, m, m))
    weights = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()).div(d**0.5).softmax(-1)
    exact = torch.einsum("bhnm,bhmd->bhnd", weights, v.double())
    for backend in ("sdpa", "reference"):
        torch.testing.assert_close(attention(q, k, v, backend).double(), exact, atol=2e-3 * scale, rtol=1e-3)
    torch.testing.assert_close(attention_map(q, k).sum(-1), torch.ones(batch, heads, n), atol=1e-5, rtol=0)


def test_backend_names():
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(InputError, match="sdpa"):
        attention(q, q, q, backend="flash")
    with pytest.raises(InputError, match="unknown attention backend"), use_backend("none"):
        pass
    with use_backend("reference"):
        attention(q, q, q)


def test_timestep_embedding_is_cosines_then_sines():
    e = timestep_embedding(torch.tensor([0, 7]), 8)
    assert e[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert e[1, 0].item() == pytest.approx(torch.cos(torch.tensor(7.0)).item())
    assert e[1, 5].item() == pytest.approx(torch.sin(torch.tensor(7.0 * 10000**-0.25)).item(), abs=1e-6)


def test_new_networks_start_from_zero_output(tiny_config):
    """Last layers are zero, so an untrained UNet predicts nothing rather than noise of its own."""
    model = models.build(tiny_config, seed=3)
    out = model.unet(latents(model, 2), torch.tensor([3, 900]), model.encode_text(["a", "b"]))
    assert out.shape == (2, *model.latent_shape) and not out.any()


def test_unet_depends_on_everything(tiny_model):
    x, t = latents(tiny_model, 2), torch.tensor([100, 100])
    context = tiny_model.encode_text(["a cat", "a cat"])
    base = tiny_model.unet(x, t, context)
    torch.testing.assert_close(tiny_model.unet(x, 100, context[:1]), base)  # a scalar t, one context for all
    assert (tiny_model.unet(x, t + 300, context) - base).abs().max() > 1e-3
    other = tiny_model.unet(x, t, tiny_model.encode_text(["a cat", "a red heart"]))
    torch.testing.assert_close(other[0], base[0])
    assert (other[1] - base[1]).abs().max() > 1e-4


def test_projected_context_carries_gradients_to_the_text(tiny_model):
    x, context = latents(tiny_model, 1), tiny_model.encode_text(["a cat"]).requires_grad_()
    direct = torch.autograd.grad(tiny_model.predict_noise(x, 500, context).square().sum(), context)[0]
    projected = tiny_model.project_context(context)
    reused = torch.autograd.grad(tiny_model.predict_noise(x, 500, projected).square().sum(), context)[0]
    assert direct.abs().max() > 0
    torch.testing.assert_close(direct, reused)


def test_gradient_checkpointing_changes_nothing(tiny_model):
    x, context = latents(tiny_model, 1), tiny_model.encode_text(["a cat"]).requires_grad_()
    grads = []
    try:
        for on in (False, True):
            tiny_model.unet.gradient_checkpointing = on
            grads.append(torch.autograd.grad(tiny_model.unet(x, 10, context).square().sum(), context)[0])
    finally:
        tiny_model.unet.gradient_checkpointing = False
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("heads", [{"num_heads": 2}, {"num_head_channels": 16}])
@pytest.mark.parametrize("linear", [False, True])
def test_unet_topologies(heads, linear):
    unet = UNet(model_channels=32, channel_mult=(1, 1, 2), num_res_blocks=2, context_dim=16, **heads,
                use_linear_projection=linear, transformer_depth=2, attention_levels=[0, 2])  # fmt: skip
    assert unet(torch.randn(2, 4, 8, 12), torch.tensor([1, 2]), torch.randn(2, 5, 16)).shape == (2, 4, 8, 12)
    assert len(unet.project_context(torch.randn(1, 5, 16)).kv) == 2 * (2 + 2 + 1 + 3 + 3)
    for both in ({}, {"num_heads": 2, "num_head_channels": 16}):
        with pytest.raises(InputError, match="num_heads"):
            UNet(model_channels=32, channel_mult=(1,), context_dim=16, **both)


def test_autoencoder_shapes_scale_and_posterior(tiny_model):
    x = torch.rand(2, 3, 32, 64) * 2 - 1
    mean, logvar = tiny_model.autoencoder.posterior(x)
    z = tiny_model.encode_image(x)
    assert z.shape == (2, 4, 8, 16) and tiny_model.decode_latents(z).shape == x.shape
    torch.testing.assert_close(z, mean * tiny_model.autoencoder.scale_factor)
    draws = torch.stack([tiny_model.encode_image(x, torch.Generator().manual_seed(i)) for i in range(400)])
    spread = (draws.std(0) / ((0.5 * logvar).exp() * tiny_model.autoencoder.scale_factor)).mean()
    assert spread.item() == pytest.approx(1, abs=0.02)
    with pytest.raises(InputError, match="multiples of 8"):
        tiny_model.encode_image(torch.zeros(1, 3, 36, 32))


def test_v_prediction_is_turned_into_noise(tiny_model):
    x, context = latents(tiny_model, 2), tiny_model.encode_text(["", ""])
    t = torch.tensor([10, 800])
    v = tiny_model.unet(x, t, context)
    a = tiny_model.schedule.alpha_bars[t].float().view(2, 1, 1, 1)
    torch.testing.assert_close(tiny_model.predict_noise(x, t, context), a.sqrt() * v + (1 - a).sqrt() * x)


def test_text_is_causal_and_padded(tiny_model):
    ids = tiny_model.text.tokenize(["a cat", "a cat on a blue background"])
    assert ids.shape == (2, 24) and ids[0, 0] == BEGIN and ids[0, 3] == END and not ids[0, 4:].any()
    hidden = tiny_model.text.encode_tokens(ids)
    torch.testing.assert_close(hidden[0, :3], hidden[1, :3])  # the same beginning, and later words cannot be seen
    assert (hidden[0, 3] - hidden[1, 3]).abs().max() > 1e-3


def test_long_prompt_is_cut_with_a_warning(tiny_model):
    with pytest.warns(UserWarning, match="cut to 22"):
        ids = tiny_model.text.tokenize(["very " * 50 + "long"])
    assert ids[0, -1] == END


def test_compact_vocabulary():
    vocabulary = compact_vocabulary(["a red heart", "a cat"])
    assert vocabulary.tolist() == sorted(vocabulary.tolist()) and {BEGIN, END} <= set(vocabulary.tolist())
    ids = torch.tensor([[BEGIN, int(vocabulary[0]), 1234, END, 0]])
    rows = compact(ids, vocabulary)[0].tolist()
    assert rows == [len(vocabulary), 2, UNKNOWN, len(vocabulary) + 1, 0]


def test_compact_text_encoder_names_unknown_words(tiny_config):
    vocabulary = compact_vocabulary(["a red heart"])
    text = models.build(tiny_config, seed=0, vocabulary=vocabulary).text
    assert text.tower.token_embedding.weight.shape[0] == len(vocabulary) + 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text(["a red heart"])
    with pytest.warns(UserWarning, match="zebra"):
        a = text(["a red zebra"])
    with pytest.warns(UserWarning, match="quagga"):
        b = text(["a red quagga"])
    torch.testing.assert_close(a[0, :4], b[0, :4])  # unknown words are all alike


def test_pool_is_the_projected_end_state(tiny_model):
    clip = tiny_model.clip
    ids = tiny_model.text.tokenize(["a cat", "two red hearts"])
    hidden = tiny_model.text.encode_tokens(ids)
    expected = torch.stack([hidden[i, (ids[i] == END).nonzero()[0, 0]] for i in range(2)])
    expected = expected @ tiny_model.text.tower.text_projection
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(tiny_model.text.pool(hidden, ids), expected)
    torch.testing.assert_close(clip.text_features(["a cat", "two red hearts"]), expected)


def test_image_features_are_normalised_and_differentiable(tiny_model):
    x = (torch.rand(2, 3, 48, 48) * 2 - 1).requires_grad_()
    features = tiny_model.clip.image_features(x)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))
    (gradient,) = torch.autograd.grad(features[0, 0], x)
    assert gradient[0].abs().max() > 0 and not gradient[1].any()


def test_no_projection_is_said(tiny_config):
    config = {k: v for k, v in tiny_config.items() if k != "vision"}
    config = config | {"text": config["text"] | {"embed_dim": None}}
    model = models.build(config, seed=0)
    ids = model.text.tokenize(["a cat"])
    assert model.clip is None
    with pytest.raises(InputError, match="no CLIP text projection"):
        model.text.pool(model.text.encode_tokens(ids), ids)


@pytest.mark.parametrize("with_clip", [True, False])
def test_saved_model_comes_back(tiny_config, tmp_path, with_clip):
    config = dict(tiny_config) if with_clip else {k: v for k, v in tiny_config.items() if k != "vision"}
    vocabulary = compact_vocabulary(["a red heart"])
    model = models.build(config, seed=0, vocabulary=vocabulary)
    models.save(model, tmp_path / "full", dtype=None)
    again = models.load(tmp_path / "full")
    assert again.fingerprint == model.fingerprint and (again.clip is not None) == with_clip
    assert not any(p.requires_grad for p in again.parameters())
    models.save(model, tmp_path / "half")
    half = models.load(tmp_path / "half", dtype=torch.float64)
    assert half.dtype == torch.float64 and half.fingerprint != model.fingerprint
    for name, p in half.named_parameters():
        torch.testing.assert_close(p.float(), model.get_parameter(name), atol=1e-3, rtol=1e-3)
    assert sorted(f.name for f in (tmp_path / "half").iterdir()) == [
        "autoencoder.safetensors", "clip.safetensors", "config.json", "unet.safetensors"]  # fmt: skip


def test_what_does_not_load_is_told_in_one_line(tiny_model, tmp_path):
    with pytest.raises(InputError, match="no checkpoint at"):
        models.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds neither a config\.json"):
        models.load(tmp_path / "empty")
    folder = tmp_path / "model"
    models.save(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["unet"]["model_channels"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"unet.safetensors does not fit the networks.* more$") as error:
        models.load(folder)
    assert "\n" not in str(error.value)
    models.save(tiny_model, folder)
    (folder / "unet.safetensors").write_bytes((folder / "unet.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match="cut short"):
        models.load(folder)
    (folder / "unet.safetensors").unlink()
    with pytest.raises(InputError, match="train it with"):
        models.load(folder)


def test_sizes_that_build_nothing_are_told_in_one_line(tiny_model, tmp_path):
    models.save(tiny_model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for section, values, message in [
        ("unet", {"model_channels": 33}, "describes no network"),
        ("unet", {"widht": 3}, "widht"),
        ("text", {"heads": 5}, "describes no network"),
        ("schedule", {"kind": "straight"}, "straight"),
    ]:
        changed = config | {section: config[section] | values}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            models.load(tmp_path)
    del config["vae"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="lacks 'vae'"):
        models.load(tmp_path)


def test_fingerprint_sees_settings_without_weights(tiny_config):
    prints = {models.build(tiny_config, seed=0).fingerprint}
    for section, values in [
        ("unet", {"num_head_channels": 8}),
        ("vae", {"scale_factor": 0.5}),
        ("text", {"quick_gelu": True}),
        ("text", {"pad_token": END}),
        ("schedule", {"kind": "linear"}),
    ]:
        prints.add(models.build(tiny_config | {section: tiny_config[section] | values}, seed=0).fingerprint)
    assert len(prints) == 6


def test_build_is_reproducible_and_leaves_the_global_generator_alone(tiny_config):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a, b = models.build(tiny_config, seed=1), models.build(tiny_config, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert a.fingerprint == b.fingerprint != models.build(tiny_config, seed=2).fingerprint
