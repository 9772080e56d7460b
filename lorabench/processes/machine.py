"""What this machine has to give: GPUs and CPU cores; how often its kernel has run out of memory; its processes."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from lorabench.config.decode import InputError
from lorabench.config.quote import clip

PATIENT_THREADS = {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}
"""For the environment before torch is imported: an idle OpenMP thread gives its core away at once.

Measured, `eigh` of 1500 x 1500 on two cores that five other processes used too: 2.5 s with it, 7 to 24 s without.
"""


def has_gpu_driver() -> bool:
    """Whether a GPU driver is loaded; says nothing of how many devices there are. Looks at files only."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def visible_gpus(device: str) -> tuple[str, ...]:
    """Values of CUDA_VISIBLE_DEVICES, one for each GPU that `device` (auto, cpu, cuda, cuda:1) means.

    InputError if it means nothing, or one that is not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise InputError(f"--device {clip(device)}: must be auto, cpu, cuda or cuda:N")
    if device == "cpu" or (device == "auto" and not has_gpu_driver()):
        return ()
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    gpus = tuple(named[:count]) if len(named) >= count else tuple(str(i) for i in range(count))
    number = device.partition(":")[2]
    if (device != "auto" and not gpus) or (number and int(number) >= count):
        raise InputError(f"--device {clip(device)}: there is no such device here: {count} CUDA devices are visible")
    return (gpus[int(number)],) if number else gpus


def available_cores() -> int:
    """CPU cores that this process may use: its affinity, and its control group's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _control_groups():
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            cores = min(cores, max(1, int(quota) // int(period)))  # "max" is no number: no quota
    return cores


def free_memory() -> float:
    """Bytes that processes can still take here: what the machine has available, or the control group is allowed."""
    free = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024.0 * int(lines["MemAvailable"].split()[0]))
    for folder in _control_groups():
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
                free.append(float(int((folder / limit).read_text()) - int((folder / usage).read_text())))
    return max(0.0, min(free))


def count_oom_kills() -> int:
    """Processes that the kernel has killed for want of memory: of this control group, else of the machine."""
    for folder in _control_groups():
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                return _counter(folder / name, "oom_kill")
    with contextlib.suppress(OSError):
        return _counter(Path("/proc/vmstat"), "oom_kill")
    return 0


def process_start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot: tells it from a later one with the same pid."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _control_groups() -> list[Path]:
    """This process's folders in the control group hierarchies: v2's, and v1's of the memory controller."""
    folders = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                folders.append(Path("/sys/fs/cgroup") / controllers / path.lstrip("/"))
    return folders


def _counter(file: Path, key: str) -> int:
    values = dict(line.split() for line in file.read_text().splitlines())
    return int(values.get(key, 0))
