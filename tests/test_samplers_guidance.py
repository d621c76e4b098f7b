"""Classifier-free guidance on a fake model: what is computed, in how many calls, and where gradients go."""

import pytest
import torch
from torch import Tensor, nn

from samplers import NoiseSchedule, ddim, guided

B, L, C = 3, 5, 4


class FakeModel(nn.Module):
    """Text-conditional and counting. Its projected context is a tuple, to tell it from a raw one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_kv, self.net = nn.Linear(C, 6), nn.Linear(2, 6)
        self.projections, self.calls = 0, []

    def project_context(self, context: Tensor) -> tuple[Tensor]:
        self.projections += 1
        return (self.to_kv(context),)

    def predict_noise(self, x: Tensor, t: int | Tensor, context: Tensor | tuple[Tensor]) -> Tensor:
        kv = context[0] if isinstance(context, tuple) else self.to_kv(context)
        assert len(kv) == len(x)
        self.calls.append((len(x), t, isinstance(context, tuple)))
        time = torch.as_tensor(t).float().reshape(-1, 1, 1) / 1000
        return torch.einsum("bnd,bld->bnl", self.net(x) + time, torch.sin(kv))[..., :2]


class BareModel:
    """A model that cannot project ahead."""

    def __init__(self, model: FakeModel) -> None:
        self.predict_noise = model.predict_noise


@pytest.fixture
def model() -> FakeModel:
    return FakeModel().requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return draw(B, 4, 2), draw(1, L, C), draw(1, L, C)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0, 7.5])
@pytest.mark.parametrize("shared_text", [True, False])
@pytest.mark.parametrize("shared_null", [True, False])
def test_guidance_is_one_call_of_twice_the_batch(model, scale, shared_text, shared_null) -> None:
    x, text, null = inputs()
    text = text if shared_text else text + torch.arange(B).reshape(B, 1, 1)
    null = null if shared_null else null - torch.arange(B).reshape(B, 1, 1)
    eps_text = model.predict_noise(x, 7, text.expand(B, -1, -1))
    eps_null = model.predict_noise(x, 7, null.expand(B, -1, -1))
    model.calls.clear()
    eps = guided(model, text, null, scale)(x, 7)
    torch.testing.assert_close(eps, eps_null + scale * (eps_text - eps_null))
    assert model.calls == [(2 * B, 7, True)]


@pytest.mark.parametrize("scale, branch", [(1, 1), (1.0, 1), (0, 2), (0.0, 2)])
def test_scales_1_and_0_run_one_branch(model, scale, branch) -> None:
    x, text, null = inputs()
    expected = model.predict_noise(x, 7, (x, text, null)[branch].expand(B, -1, -1))
    model.calls.clear()
    torch.testing.assert_close(guided(model, text, null, scale)(x, 7), expected)
    assert model.calls == [(B, 7, True)]


def test_scale_1_needs_no_null_context_and_others_do(model) -> None:
    x, text, _ = inputs()
    assert guided(model, text)(x, 3).shape == x.shape
    for scale in (0, 2.0):
        with pytest.raises(ValueError, match="null_context"):
            guided(model, text, scale=scale)


def test_a_timestep_for_each_image(model) -> None:
    x, text, null = inputs()
    denoise, t = guided(model, text, null, 2.0), torch.tensor([1, 500, 999])
    together = denoise(x, t)
    for i in range(B):
        torch.testing.assert_close(together[i : i + 1], denoise(x[i : i + 1], int(t[i])))


def test_a_context_for_another_number_of_images_is_refused(model) -> None:
    x, text, null = inputs()
    with pytest.raises(ValueError, match="2 images"):
        guided(model, text.expand(2, -1, -1), null, 2.0)(x, 7)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_text_is_projected_once_per_batch_size(model, scale) -> None:
    x, text, null = inputs()
    denoise = guided(model, text, null, scale)
    ddim.sample(denoise, x, NoiseSchedule().trajectory(20))
    assert model.projections == 1 and len(model.calls) == 20
    again = denoise(x, 500)
    denoise(x[:1], 500)
    assert model.projections == 2
    torch.testing.assert_close(denoise(x, 500), again)
    assert model.projections == 2
    torch.testing.assert_close(guided(BareModel(model), text, null, scale)(x, 500), again)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_the_network_works_in_the_contexts_precision(model, scale) -> None:
    x, text, null = inputs()
    denoise = guided(model, text, null, scale)
    assert torch.equal(denoise(x.double(), 7), denoise(x, 7).double())


@pytest.mark.parametrize("which", ["text", "null"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_gradients_reach_the_context_at_every_call(model, which, scale) -> None:
    """Twice forward and backward, as an optimiser does: each call must have a graph of its own."""
    if scale == 1.0 and which == "null":
        return  # the null branch is not run
    x, text, null = inputs()
    learned = (text if which == "text" else null).requires_grad_()
    denoise, gradients = guided(model, text, null, scale), []
    for _ in range(2):
        (gradient,) = torch.autograd.grad(denoise(x, 7).square().sum(), learned)
        gradients.append(gradient)
        with torch.no_grad():
            learned -= 0.1 * gradient
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert not torch.allclose(*gradients)  # the second call saw the changed context
    assert model.projections == 0

    direction, step = torch.ones_like(learned), 1e-3  # and the gradient is the right one
    loss = lambda: denoise(x, 7).square().sum()
    (gradient,) = torch.autograd.grad(loss(), learned)
    with torch.no_grad():
        base = learned.clone()
        high = learned.copy_(base + step * direction) is not None and loss()
        low = learned.copy_(base - step * direction) is not None and loss()
    assert float((high - low) / (2 * step)) == pytest.approx(float((gradient * direction).sum()), rel=0.02)
