"""The loop on a small problem: resuming, averaging, sharing a batch between processes, dying and being stopped."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from errors import InputError
from training.loop import BatchIndices, Objective, Settings, ema_update, learning_rate, train

SETTINGS = Settings(steps=12, batch_size=8, lr=0.01, warmup=3, ema_decay=0.9, save_every=4, validate_every=100)


class Points:
    """An endless data set: item i is a fixed function of i."""

    def __len__(self):
        return 10**9

    def __getitem__(self, i):
        return {"image": torch.tensor([math.sin(i), math.cos(3 * i), (i % 7) / 7])}


class Regression(Objective):
    """Noisy regression whose gradient depends on the data, on the noise and on the weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trained = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 1))

    def draw(self, batch_size, generator):
        return {"noise": torch.randn(batch_size, 1, generator=generator)}

    def forward(self, batch):
        x = batch["image"]
        error = self.trained(x) - x.prod(dim=1, keepdim=True) - 0.1 * batch["noise"]
        loss = error.square().mean()
        return loss, {"abs": error.abs().mean()}


def run(folder, settings=SETTINGS, objective=None, log=lambda *_: None):
    objective = objective or Regression()
    finished = train(objective, Points(), settings, Path(folder) / "state.pt", torch.device("cpu"), log)
    return finished, objective


def state(folder):
    return torch.load(Path(folder) / "state.pt", weights_only=True)


def assert_same_state(a, b, **tolerance):
    for part in ("trained", "ema"):
        for name in a[part]:
            torch.testing.assert_close(a[part][name], b[part][name], msg=f"{part}.{name}", **tolerance)


def test_resumed_run_equals_uninterrupted(tmp_path):
    run(tmp_path / "whole")

    class Stop(Exception):
        pass

    calls = 0

    class Interrupted(Regression):
        def forward(self, batch):
            nonlocal calls
            calls += 1
            if calls == 7:  # after the checkpoint at step 4, before that at step 8
                raise Stop
            return super().forward(batch)

    with pytest.raises(Stop):
        run(tmp_path / "cut", SETTINGS, Interrupted())
    assert state(tmp_path / "cut")["step"] == 4
    run(tmp_path / "cut")
    whole, cut = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert cut["step"] == 12
    assert_same_state(whole, cut, atol=0, rtol=0)
    for index, slot in whole["optimizer"]["state"].items():
        torch.testing.assert_close(slot["exp_avg_sq"], cut["optimizer"]["state"][index]["exp_avg_sq"], atol=0, rtol=0)


def test_training_lowers_the_loss(tmp_path):
    losses = []
    run(
        tmp_path,
        replace(SETTINGS, steps=300, log_every=1),
        log=lambda numbers, pictures, step: losses.append(numbers.get("loss")),
    )
    losses = [x for x in losses if x is not None]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_accumulation_equals_one_large_batch(tmp_path):
    """Four micro-batches see the pictures of one batch of the same total; only the noise is drawn in other pieces,
    so it is switched off here."""

    class Noiseless(Regression):
        def draw(self, batch_size, generator):
            return {"noise": torch.zeros(batch_size, 1)}

    run(tmp_path / "one", SETTINGS, Noiseless())
    run(tmp_path / "four", replace(SETTINGS, accumulate=4), Noiseless())
    assert_same_state(state(tmp_path / "one"), state(tmp_path / "four"), atol=1e-5, rtol=1e-4)


def worker(rank, world, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541", "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    run(folder)
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    mp.spawn(worker, args=(2, str(tmp_path / "two")), nprocs=2)
    run(tmp_path / "one")
    assert_same_state(state(tmp_path / "one"), state(tmp_path / "two"), atol=1e-6, rtol=1e-5)


def test_processes_share_the_batch_without_gap_or_overlap():
    settings = Settings(steps=5, batch_size=12, lr=1, warmup=0, accumulate=2)
    shares = [list(BatchIndices(settings, 2, rank, 3)) for rank in range(3)]
    assert all(len(share) == 6 for share in shares)
    together = sorted(i for share in shares for batch in share for i in batch)
    assert together == list(range(2 * 12, 5 * 12))


CHILD = """
import sys, time, torch
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from test_training_loop import Points, Regression, SETTINGS
from dataclasses import replace
from training.loop import train
class Slow(Regression):
    def forward(self, batch):
        time.sleep(0.02)
        return super().forward(batch)
settings = replace(SETTINGS, steps=60, save_every=3)
done = train(Slow(), Points(), settings, Path({folder!r}) / "state.pt", torch.device("cpu"))
sys.exit(0 if done else 143)
"""


def start(folder):
    tests = Path(__file__).parent
    code = CHILD.format(root=str(tests.parent), tests=str(tests), folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def wait_for_state(process, folder):
    deadline = time.time() + 60
    while not (folder / "state.pt").exists():
        assert process.poll() is None and time.time() < deadline, "the child never wrote a checkpoint"
        time.sleep(0.01)


def test_killed_and_terminated_runs_continue_to_the_same_result(tmp_path):
    folder = tmp_path / "cut"
    process = start(folder)
    wait_for_state(process, folder)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    after_kill = state(folder)["step"]
    assert after_kill % 3 == 0 and after_kill > 0

    process = start(folder)
    time.sleep(0.5)
    while state(folder)["step"] == after_kill and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert after_kill < state(folder)["step"] < 60

    process = start(folder)
    assert process.wait(timeout=60) == 0
    run(tmp_path / "whole", replace(SETTINGS, steps=60, save_every=3))
    assert_same_state(state(tmp_path / "whole"), state(folder), atol=0, rtol=0)
    assert all(f.name == "state.pt" or f.suffix == ".partial" for f in folder.iterdir())


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path):
    class Diverging(Regression):
        def forward(self, batch):
            loss, values = super().forward(batch)
            return loss * float("nan"), values

    with pytest.raises(InputError, match="loss became nan by step 4"):
        run(tmp_path, replace(SETTINGS, log_every=100), Diverging())
    assert not (tmp_path / "state.pt").exists()


def test_a_diverged_run_keeps_its_last_good_state(tmp_path):
    class LateInfinity(Regression):
        """The loss stays finite, its gradient does not."""

        def forward(self, batch):
            loss, values = super().forward(batch)
            self.calls = getattr(self, "calls", 0) + 1
            w = self.trained[0].weight
            return loss + (((w - w.detach()).sqrt() * 0).sum() if self.calls == 8 else 0), values

    with pytest.raises(InputError, match="grad_norm became nan by step 8"):
        run(tmp_path, replace(SETTINGS, log_every=100), LateInfinity())
    good = state(tmp_path)
    assert good["step"] == 4 and all(w.isfinite().all() for w in good["trained"].values())


def test_a_finished_run_publishes_what_a_kill_left_undone(tmp_path):
    class Published(Regression):
        exported = validated = 0

        def export(self, trained):
            self.exported += 1
            if self.killed:
                raise KeyboardInterrupt

        def validate(self, trained):
            self.validated += 1
            return {"score": 1.0}, {}

    first, again = Published(), Published()
    first.killed, again.killed = True, False
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, replace(SETTINGS, save_every=100), first)
    assert state(tmp_path)["step"] == 12 and first.validated == 0
    lines = []
    finished, _ = run(tmp_path, SETTINGS, again, log=lambda *line: lines.append(line))
    assert finished and again.exported == again.validated == 1 and lines == [({"score": 1.0}, {}, 12)]


@pytest.mark.parametrize("name", ["steps", "accumulate", "save_every"])
def test_counts_are_at_least_one(name):
    with pytest.raises(InputError, match=f"{name}=0"):
        replace(SETTINGS, **{name: 0})


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(InputError, match="batch_size=8 is no multiple of 1 processes x 3"):
        run(tmp_path, replace(SETTINGS, accumulate=3))
    run(tmp_path)
    with pytest.raises(InputError, match="seed=0, not 1"):
        run(tmp_path, replace(SETTINGS, seed=1, steps=20))

    class Wider(Regression):
        def __init__(self):
            super().__init__()
            self.trained = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 1))

    with pytest.raises(InputError, match="other sizes"):
        run(tmp_path, SETTINGS, Wider())


def test_learning_rate_and_average():
    s = Settings(steps=100, batch_size=1, lr=2.0, warmup=10, min_lr=0.1)
    assert learning_rate(0, s) == pytest.approx(0.2)
    assert learning_rate(9, s) == pytest.approx(2.0)
    assert learning_rate(55, s) == pytest.approx(2.0 * 0.55)
    assert learning_rate(100, s) == pytest.approx(0.2)
    average, value = torch.zeros(1), torch.ones(1)
    ema_update(0.5)([average], [value], torch.tensor(1000))
    assert average.item() == pytest.approx(0.5)
    ema_update(0.5)([average], [torch.zeros(1)], torch.tensor(0))  # the first average keeps a tenth only
    assert average.item() == pytest.approx(0.05)


def test_log_lines_are_json_numbers(tmp_path):
    lines = []
    run(tmp_path, replace(SETTINGS, log_every=3, save_every=100), log=lambda *line: lines.append(line))
    train_lines = [numbers for numbers, _, _ in lines if "loss" in numbers]
    assert [step for numbers, _, step in lines if "loss" in numbers] == [3, 6, 9, 12]
    assert json.loads(json.dumps(train_lines)) == train_lines
    assert {"loss", "abs", "lr", "grad_norm", "images_per_second"} <= train_lines[0].keys()
