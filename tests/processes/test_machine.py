"""What the machine says of itself, against files written for the test."""

import os
from pathlib import Path

import pytest

from lorabench.config.decode import InputError
from lorabench.processes import machine


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group of its own."""
    monkeypatch.setattr(machine, "_control_groups", lambda: [tmp_path])
    return tmp_path


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", None), ("150000 100000", 1), ("50000 100000", 1)])
def test_cores_are_bounded_by_affinity_and_quota(group: Path, quota: str, cores: int | None) -> None:
    (group / "cpu.max").write_text(quota)
    assert machine.available_cores() == (cores or len(os.sched_getaffinity(0)))


def test_out_of_memory_kills_are_those_of_the_control_group(group: Path) -> None:
    (group / "memory.events").write_text("low 0\nmax 9\noom 4\noom_kill 3\n")
    assert machine.count_oom_kills() == 3


def test_without_a_control_group_the_machine_is_asked(group: Path) -> None:
    vmstat = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    assert machine.count_oom_kills() == int(vmstat.get("oom_kill", 0))


def test_the_cpu_needs_no_gpu_and_a_missing_one_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert machine.visible_gpus("cpu") == ()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="--device cuda: there is no such device here: 0 CUDA devices"):
        machine.visible_gpus("cuda")


@pytest.mark.parametrize(
    ("device", "named", "gpus"),
    [
        ("cuda", None, ("0", "1", "2")),
        ("cuda:1", None, ("1",)),
        ("cuda", "GPU-x,GPU-y,5", ("GPU-x", "GPU-y", "5")),
        ("cuda:2", "GPU-x,GPU-y,5", ("5",)),
    ],
)
def test_workers_get_the_devices_that_are_visible(
    device: str, named: str | None, gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert machine.visible_gpus(device) == gpus
