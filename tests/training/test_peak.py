"""The device's peak: the fastest product ever seen, kept for later runs, by a clock of the test's own."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from lorabench.training import peak
from lorabench.training.peak import peak_flops

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(seconds…)`: products take so long from now on, over and over; gives the list of those made."""
    monkeypatch.setenv("LORABENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(peak, "SIZES", {"cpu": (100,)})

    def set_speed(*seconds):
        made, times = [], itertools.cycle(seconds)
        monkeypatch.setattr(peak, "_seconds", lambda a: made.append(a.shape) or next(times))
        return made

    return set_speed


def test_the_best_of_many_counts_and_is_kept(machine, tmp_path):
    made = machine(8.0, 4.0, 8.0)
    rate, source = peak_flops(CPU, "float32")
    assert rate == 2 * 100**3 / 4 and len(made) == peak.FIRST
    assert source.startswith("measured: the fastest product of 100² float32 matrices, ")
    (file,) = (tmp_path / "cache" / "peak_flops").iterdir()
    kept = json.loads(file.read_text())
    assert kept["flop_per_second"] == rate and kept["dtype"] == "float32" and kept["threads"] >= 1


def test_a_busy_machine_lowers_nothing_and_a_quiet_one_puts_right(machine):
    machine(8.0)
    assert peak_flops(CPU, "float32")[0] == 2 * 100**3 / 8
    made = machine(1.0)
    assert peak_flops(CPU, "float32")[0] == 2 * 100**3 and len(made) == peak.LATER
    machine(50.0)
    assert peak_flops(CPU, "float32")[0] == 2 * 100**3


def test_a_run_that_was_faster_has_it_measured_at_length(machine):
    machine(8.0)
    peak_flops(CPU, "float32")
    made = machine(2.0)
    assert peak_flops(CPU, "float32", beyond=1e6)[0] == 1e6 and len(made) == peak.FIRST


def test_threads_and_dtypes_are_apart(machine, monkeypatch):
    machine(1.0)
    peak_flops(CPU, "float32")
    machine(4.0)
    assert peak_flops(CPU, "bfloat16")[0] == 2 * 100**3 / 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    rate, source = peak_flops(CPU, "float32")
    assert rate == 2 * 100**3 / 4 and "77 threads" in source


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"flop_per_second": "x"}', '{"flop_per_second": -1}',
                                     '{"flop_per_second": Infinity}', '{"flop_per_second": NaN}'])  # fmt: skip
def test_what_is_damaged_is_measured_again(content, machine, tmp_path):
    machine(2.0)
    peak_flops(CPU, "float32")
    (file,) = (tmp_path / "cache" / "peak_flops").iterdir()
    file.write_text(content)
    assert peak_flops(CPU, "float32")[0] == 1e6
    assert json.loads(file.read_text())["flop_per_second"] == 1e6


def test_a_folder_that_cannot_be_written_costs_nothing_else(machine, tmp_path):
    (tmp_path / "cache").write_text("a file")
    machine(2.0)
    assert peak_flops(CPU, "float32")[0] == 1e6


def test_slow_products_are_few(machine, monkeypatch):
    made = machine(2.0)
    monkeypatch.setattr(peak, "SECONDS", -1.0)
    assert peak_flops(CPU, "float32")[0] == 1e6 and len(made) == 1


def test_measuring_the_device_leaves_the_random_stream_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("LORABENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(peak, "FIRST", 2)
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    flops, source = peak_flops(CPU, "float32")
    assert torch.equal(torch.rand(4), want)
    assert flops > 1e9 and "measured" in source
