"""Measuring: peaks by phase, clocks that add up, throughput without warm-up."""

from __future__ import annotations

import ctypes
import itertools
import resource
import time

import pytest
import torch

from lorabench.training import meter as meters
from lorabench.training.live import LiveTensors
from lorabench.training.meter import Meter

CPU = torch.device("cpu")
MIB = 2**20


def touch(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB, dtype=torch.uint8)


def test_each_phase_has_its_own_peak():
    meter = Meter(CPU, steps=100)
    if not meter._process.can_reset:
        pytest.skip("this kernel does not let a process reset its high-water mark")
    with meter.phase("forward_backward"):
        del_me = touch(300)
        del del_me
    with meter.phase("optimizer"):
        kept = touch(50)
    measures, how = meter.memory()
    assert measures["forward_backward_peak_gib"] * 1024 == pytest.approx(300, abs=30)
    assert measures["optimizer_peak_gib"] * 1024 == pytest.approx(50, abs=30)
    assert measures["peak_gib"] == measures["forward_backward_peak_gib"]
    assert "VmHWM" in how and kept is not None


def test_an_update_is_measured_apart_from_what_the_pass_before_it_has_freed():
    meter = Meter(CPU, steps=100)
    if not meter._process.can_reset:
        pytest.skip("this kernel does not let a process reset its high-water mark")
    for size in (20, 40, 300):  # the third is not like the second: nothing an optimizer does, and not looked at
        with meter.phase("forward_backward"):
            blocks = [touch(8) for _ in range(25)]
            del blocks
        with meter.phase("optimizer"):
            kept = touch(size)
    assert meter.memory()[0]["optimizer_peak_gib"] * 1024 == pytest.approx(40, abs=30) and kept is not None


def test_what_a_step_frees_is_kept_for_the_next():
    for parameter in (meters.M_TRIM_THRESHOLD, meters.M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(parameter, 128 * 1024)  # as a process begins
    with Meter(CPU, steps=100).phase("forward_backward"):
        faults = [page_faults() for _ in range(3) if [touch(8) for _ in range(25)]]
    assert faults[2] - faults[1] < 8 * 25 * 256 / 10, "pages of 4 KiB, faulted in anew"


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_the_baseline_is_not_counted():
    held = touch(200)
    meter = Meter(CPU, steps=100)
    with meter.phase("forward_backward"):
        pass
    assert meter.memory()[0]["peak_gib"] * 1024 < 30
    assert held is not None


def test_clocks_are_exclusive_and_add_up(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    meter = Meter(CPU, steps=100)  # every look at the clock takes a second
    with meter.clock("load"):
        pass
    with meter.clock("train"), meter.clock("evaluate"):
        pass
    wall = meter.wall_time()
    assert wall["load_seconds"] == 1 and wall["evaluate_seconds"] == 1 and wall["train_seconds"] == 2
    assert wall["total_seconds"] == next(now) - 1


def test_throughput_leaves_the_warm_up_out(monkeypatch):
    times = itertools.chain(range(5), *([i, i + 0.5] for i in range(5, 25)))  # a warm-up step's end is not looked at
    monkeypatch.setattr(Meter, "_now", lambda self: next(times))
    meter = Meter(CPU, steps=50)
    for _ in range(25):
        with meter.step(tokens=100, padded=150, labels=10):
            pass
    meter.flush()
    got = meter.throughput()
    assert len(meter.step_rows) == 20
    assert got["tokens_per_second"] == 200 and got["padded_tokens_per_second"] == 300
    assert got["label_tokens_per_second"] == 20 and got["step_seconds_median"] == got["step_seconds_p95"] == 0.5


def test_a_resumed_run_keeps_what_was_measured():
    first, second = Meter(CPU, steps=10), Meter(CPU, steps=10)
    with first.clock("train"):
        time.sleep(0.02)
    first.peaks, first.step_rows = {"optimizer_peak_gib": 5.0}, [(0.5, 100, 100, 100)]
    second.restore(first.state)
    assert second.memory()[0]["peak_gib"] == 5.0
    assert second.throughput()["tokens_per_second"] == 200
    assert second.wall_time()["train_seconds"] >= 0.02


def test_live_tensors_count_what_is_there_at_once():
    held = torch.ones(MIB)
    with LiveTensors([held, held.view(2, -1)]) as live:
        assert live.live == held.nbytes  # a view is no new memory
        a = held + 1
        b = a * 2
        del a
        c = b.reshape(-1)
        assert live.live == 2 * held.nbytes and c is not None
    assert live.peak == 3 * held.nbytes


def test_live_tensors_of_a_step_are_weights_gradients_and_optimizer_states():
    model = torch.nn.Sequential(*[torch.nn.Linear(512, 512, bias=False) for _ in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    meter = Meter(CPU, steps=100)
    for _ in range(3):
        with meter.step(1, 1, 1), meter.live_tensors(model, optimizer):
            model(torch.ones(1, 512)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    weights = sum(p.nbytes for p in model.parameters())
    assert meter.memory()[0]["tensor_peak_gib"] * meters.GIB == pytest.approx(4 * weights, rel=0.01)
