"""The loop on a small problem: resuming, averaging, ending by steps or by time."""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from errors import InputError
from training import loop
from training.loop import Objective, Settings, train, update_average

SETTINGS = Settings(steps=12, batch_size=8, lr=0.01, warmup=3, ema_decay=0.9, save_every=4, validate_every=100)


class Points:
    """An endless data set: item i is a fixed function of i."""

    def __getitem__(self, i):
        return {"image": torch.tensor([math.sin(i), math.cos(3 * i), (i % 7) / 7])}


class Regression(Objective):
    """Noisy regression whose gradient depends on the data, on the noise and on the weights."""

    def __init__(self, width=16, noise=0.1, before=lambda call: None):
        torch.manual_seed(0)
        model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, 1))})
        super().__init__(model, "net", Path())
        self.noise, self.before, self.calls, self.exported = noise, before, 0, 0

    def draw(self, batch_size, generator):
        return {"noise": torch.randn(batch_size, 1, generator=generator)}

    def forward(self, batch):
        self.calls += 1
        factor = self.before(self.calls) or 1.0
        x = batch["image"]
        error = self.trained(x) - x.prod(dim=1, keepdim=True) - self.noise * batch["noise"]
        return factor * error.square().mean(), {"abs": error.abs().mean()}

    def validate(self, trained):
        return {"score": 1.0}, {}

    def export(self, trained):
        self.exported += 1


def run(folder, settings=SETTINGS, objective=None, **options):
    lines = []

    def log(numbers, pictures, step):
        lines.append(numbers | {"step": step})

    folder.mkdir(exist_ok=True)
    file, device = folder / "state.pt", torch.device("cpu")
    return train(objective or Regression(), Points(), settings, file, device, log=log, **options), lines


def state(folder):
    return torch.load(folder / "state.pt", weights_only=True)


def interrupt(call):
    if call == 7:
        raise KeyboardInterrupt


def terminate(call, number=signal.SIGTERM):
    if call == 6:
        os.kill(os.getpid(), number)


def test_a_run_cut_short_resumes_to_the_bit(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):  # after the state of step 4, before that of step 8
        run(tmp_path / "killed", objective=Regression(before=interrupt))
    assert state(tmp_path / "killed")["step"] == 4
    finished, _ = run(tmp_path / "stopped", objective=Regression(before=terminate))
    assert not finished and state(tmp_path / "stopped")["step"] == 6
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "ctrl-c", objective=Regression(before=lambda call: terminate(call, signal.SIGINT)))
    assert state(tmp_path / "ctrl-c")["step"] == 6
    assert signal.getsignal(signal.SIGINT) is before
    for folder in ("killed", "stopped", "ctrl-c"):
        assert run(tmp_path / folder)[0]
        whole, cut = (state(tmp_path / name) | {"seconds": 0} for name in ("whole", folder))
        torch.testing.assert_close(whole, cut, atol=0, rtol=0)


def test_minutes_end_a_run_and_bend_its_cosine(tmp_path, monkeypatch):
    """Every step takes a second, the first of a process 100; ten seconds are to be trained."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def tick(call, stop_at=None):
        clock.now += 100 if call == 1 else 1
        if call == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = replace(SETTINGS, minutes=10 / 60, warmup=1, min_lr=0.2, log_every=1)
    _, lines = run(tmp_path / "whole", settings, Regression(before=tick))
    rates = [line["lr"] for line in lines if "lr" in line]
    seconds = [0, *range(10)]  # at the start of each step
    assert {"loss", "abs", "grad_norm"} < lines[0].keys()
    assert rates == pytest.approx([0.01 * (0.6 + 0.4 * math.cos(math.pi * s / 10)) for s in seconds])
    assert state(tmp_path / "whole")["step"] == 11

    assert not run(tmp_path / "cut", settings, Regression(before=lambda call: tick(call, stop_at=5)))[0]
    assert state(tmp_path / "cut")["seconds"] == 4
    finished, lines = run(tmp_path / "cut", settings, Regression(before=tick))
    assert finished and lines[0]["lr"] == pytest.approx(rates[5])
    assert state(tmp_path / "cut")["step"] == 12  # the second process's first step is not charged either


@pytest.mark.parametrize("name", ["loss", "gradient", "weights"])
def test_a_diverged_run_keeps_its_last_good_state(tmp_path, name):
    """Weights: also where neither the loss nor its gradient shows it, as after a last step."""

    def breaks(call):
        if call == 8:
            w = objective.trained[0].weight
            infinite_slope = 1 + ((w - w.detach()).sqrt() * 0).sum()  # of a finite loss
            objective.idle.fill_(math.inf if name == "weights" else 0)
            return {"loss": math.nan, "gradient": infinite_slope, "weights": 1.0}[name]

    objective = Regression(before=breaks)
    objective.trained.register_parameter("idle", nn.Parameter(torch.zeros(1)))
    objective.idle = objective.trained.idle.data
    with pytest.raises(InputError, match=r"finite .* 8"):
        run(tmp_path, objective=objective)
    good = state(tmp_path)
    assert good["step"] == 4 and all(w.isfinite().all() for w in good["trained"].values())


def test_a_damaged_state_is_one_line(tmp_path):
    run(tmp_path)
    whole = (tmp_path / "state.pt").read_bytes()
    torch.save({"seed": 0, "batch_size": 8}, tmp_path / "state.pt")
    bare = (tmp_path / "state.pt").read_bytes()
    for content in (b"", whole[:1000], whole[: len(whole) // 2], b"text", whole[:-30], bare):
        (tmp_path / "state.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"state\.pt") as error:
            run(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "state.pt").write_bytes(whole)
    for word, options in {"seed": {"seed": 1}, "sizes": {"objective": Regression(width=32)}}.items():
        with pytest.raises(InputError, match=word):
            run(tmp_path, **options)


def test_numbers_out_of_range_are_refused():
    wrong = [(name, v) for name in ("ema_decay", "lr", "minutes", "warmup") for v in (math.nan, math.inf, -1, "x")]
    for name, value in (*wrong, ("steps", 0), ("batch_size", 2.5), ("clip_grad", 0), ("min_lr", 1.5)):
        with pytest.raises(InputError, match=rf"training\.{name}"):
            replace(SETTINGS, **{name: value})
    for betas in ([0.9], (0.9, 1), (0.9, math.nan)):
        with pytest.raises(InputError, match="betas"):
            replace(SETTINGS, betas=betas)


def test_a_kill_before_the_publication_is_made_up_for(tmp_path):
    first, again = Regression(), Regression()
    first.export = lambda trained: interrupt(first.calls - 5)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, replace(SETTINGS, save_every=100), first)
    finished, lines = run(tmp_path, replace(SETTINGS, save_every=100), again)
    assert finished and again.exported == 1 and lines[-1] == {"score": 1.0, "step": 12}
    assert run(tmp_path, objective=again) == (True, [])


def test_learning_rate_and_average_are_their_formulas():
    assert replace(SETTINGS, minutes=0.0).progress(1, 0.1) == 1  # no time is no error
    s = replace(SETTINGS, steps=100, lr=2.0, warmup=10, min_lr=0.1)
    assert s.learning_rate(0, 0) == pytest.approx(0.2)
    assert s.learning_rate(50, 0) == pytest.approx(2.0 * 0.55)
    assert s.learning_rate(100, 0) == pytest.approx(0.2)
    average, trained = nn.Linear(1, 1), nn.Linear(1, 1)
    for step, kept in ((1000, 0.75), (0, 0.1)):  # at first a tenth of the average stays
        before = average.weight.item()
        update_average(average, trained, step, 0.75)
        assert average.weight.item() == pytest.approx(kept * before + (1 - kept) * trained.weight.item())
