"""Conditioning, and classifier-free guidance on a fake model: its arithmetic, its calls, and its gradients."""

import pytest
import torch
from torch import Tensor, nn

from samplers import Conditioning, NoiseSchedule, ddim, guided
from tests.conftest import normal

B, L, C = 3, 5, 4


class FakeModel(nn.Module):
    """Conditional on text, and counting. Its projected conditioning is a tuple, to tell it from a raw one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_kv, self.net = nn.Linear(C, 6), nn.Linear(2, 6)
        self.projections, self.calls = 0, []

    def encode_text(self, prompts) -> Conditioning:
        return Conditioning(torch.stack([torch.full((L, C), float(len(prompt))) for prompt in prompts]))

    def project(self, conditioning: Conditioning) -> tuple[Tensor]:
        self.projections += 1
        return (self.to_kv(conditioning.states),)

    def predict(self, x: Tensor, t: int, conditioning: Conditioning | tuple[Tensor]) -> Tensor:
        projected = isinstance(conditioning, tuple)
        kv = conditioning[0] if projected else self.to_kv(conditioning.states)
        assert len(kv) == len(x)
        self.calls.append((len(x), t, projected))
        return torch.einsum("bnd,bld->bnl", self.net(x.float()) + t / 1000, torch.sin(kv))[..., :2].to(x.dtype)


@pytest.fixture
def model() -> FakeModel:
    return FakeModel().requires_grad_(False)


def inputs(rows: int = 1) -> tuple[Tensor, Conditioning, Conditioning]:
    x, text, null = normal(B, 4, 2), normal(rows, L, C, seed=1), normal(1, L, C, seed=2)
    return x.float(), Conditioning(text.float()), Conditioning(null.float())


@pytest.mark.parametrize("scale", [-1.0, 0.5, 7.5, 1, 0.0])
@pytest.mark.parametrize("rows", [1, B])
def test_guidance_is_one_call_of_twice_the_batch_or_of_one_branch(model, scale, rows) -> None:
    x, text, null = inputs(rows)
    of_text, of_null = (model.predict(x, 7, branch.expand(B)) for branch in (text, null))
    model.calls.clear()
    torch.testing.assert_close(guided(model, text, scale, null)(x, 7), of_null + scale * (of_text - of_null))
    assert model.calls == [(B if scale in (0, 1) else 2 * B, 7, True)]


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_text_is_projected_once_per_batch_size(model, scale) -> None:
    x, text, null = inputs()
    denoise = guided(model, text, scale, null)
    ddim.sample(denoise, x, NoiseSchedule().trajectory(20))
    assert model.projections == 1 and len(model.calls) == 20
    denoise(x[:1], 500)
    denoise(x, 500)
    assert model.projections == 2
    with pytest.raises(RuntimeError):  # two texts for three images
        guided(model, inputs(2)[1], scale or 1.0, null)(x, 7)


@pytest.mark.parametrize("which", ["text", "null"])
def test_gradients_reach_the_conditioning_at_every_call(model, which) -> None:
    """Twice forward and backward, as an optimiser does: each call must have a graph of its own."""
    x, text, null = inputs()
    learned = (text if which == "text" else null).states.requires_grad_()
    denoise, gradients = guided(model, text, 3.0, null), []
    for _ in range(2):
        (gradient,) = torch.autograd.grad(denoise(x, 7).square().sum(), learned)
        gradients.append(gradient)
        with torch.no_grad():
            learned -= 0.1 * gradient
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert not torch.allclose(*gradients)  # the second call saw the changed conditioning
    assert model.projections == 0


def test_a_conditioning_is_interpolated_indexed_and_joined_as_a_whole() -> None:
    a, b = (Conditioning(torch.randn(2, L, C), torch.randn(2, 6)) for _ in range(2))
    mixed = 0.25 * a + b * 0.75
    joined = Conditioning.cat([a[0], b[[1]], mixed])
    for part in ("states", "vector"):
        x, y = getattr(a, part), getattr(b, part)
        torch.testing.assert_close(getattr(mixed, part), 0.25 * x + 0.75 * y)
        assert torch.equal(getattr(joined, part)[:2], torch.stack([x[0], y[1]]))
    assert len(joined) == 4 and (a[0] + Conditioning(b.states[:1], b.vector[:1])).vector.shape == (1, 6)
