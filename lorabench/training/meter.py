"""What a run costs: peak memory by phase, throughput, energy.

A phase's peak is read at its end and reset at its beginning. On CUDA the allocator counts; on the CPU the kernel's
high-water mark of the resident set (VmHWM; `ru_maxrss` would be inherited from the parent), above what the process
held before the base was loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorabench.spec.run_spec import RunSpec

GIB = 2**30
WARM_UP_STEPS = 5
"""Steps left out of throughput after each start (a tenth of the steps where that is less)."""
TRAINING_PHASES = ("rollout", "forward_backward", "optimizer")
"""Of a step; in the first a model writes what it is trained on, if it is its own answers."""
UPDATES_MEASURED = 2
"""Updates whose memory is measured on the CPU: the second has the optimizer's state, and all later ones are like it."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt (malloc.h); of the second it takes half an arena, 32 MiB, at most."""
Shapes = tuple[tuple[int, ...], ...]
"""(examples, positions) of each forward pass of a step on this process; (examples, positions, positions of the decoder)
of an encoder-decoder."""


class Meter:
    """Measures one attempt at a run; `state` goes into the checkpoint, so that a resumed run keeps what was seen."""

    def __init__(self, device: torch.device, steps: int, unit: str = "tokens"):
        self.device, self.unit = device, unit
        self.warm_up = min(WARM_UP_STEPS, steps // 10)
        self.peaks: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        """Wall time by clock; each second belongs to the innermost clock, or to `other`."""
        self.step_rows: list[tuple[float, int, int, int, Shapes]] = []
        """(seconds, tokens, padded tokens, label tokens, this process's passes) of each step past the warm-up."""
        self.energy_joules = 0.0
        self._pending: list[tuple[Any, Any, int, int, int, Shapes]] = []
        self._seen = 0
        self._running, self._since = "other", self._wall()
        self._process = _Process()
        self._energy = EnergyCounter(device)
        self.baseline_gib = 0.0
        self._updates = 0
        if device.type == "cpu":
            keep_freed_memory()
        self.set_baseline()

    @classmethod
    def of_run(cls, spec: RunSpec, device: torch.device) -> Meter:
        return cls(device, spec.total_steps, spec.task.unit)

    def set_baseline(self) -> None:
        """Count CPU memory from here: what the process and its data hold is not the method's."""
        release_memory()
        self.baseline_gib = self._process.resident() / GIB

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around what is read before the base: on the clock `load`, and of no count in the memory of what follows."""
        with self.clock("load"):
            yield
            self.set_baseline()

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Around the base's loading: its time, and its peak memory."""
        with self.clock("load"), self.phase("load"):
            yield

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around the steps of a task: their time and energy. Of one that is stopped `state` tells."""
        self.start_training()
        with self.clock("train"):
            yield
        self.end_training()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the peak memory inside; on the CPU above what was in use before, and of the first updates alone."""
        if self.device.type == "cpu" and name != "forward_backward":
            self._updates += name == "optimizer"
            if name == "optimizer" and self._updates > UPDATES_MEASURED:
                yield
                return
            release_memory(collect=False)
        self._reset_peak()
        try:
            yield
        finally:
            for key, value in self._peak(name).items():
                self.peaks[key] = max(self.peaks.get(key, 0.0), value)

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Count the wall time inside as `name`'s, and no longer as the surrounding clock's."""
        self._tick()
        outer, self._running = self._running, name
        try:
            yield
        finally:
            self._tick()
            self._running = outer

    @contextlib.contextmanager
    def step(self, tokens: int, padded: int, labels: int, shapes: Shapes = ()) -> Iterator[None]:
        """Time one optimizer step. On CUDA by events, so that nothing waits for the device."""
        start = self._now()
        yield
        self._seen += 1
        if self._seen > self.warm_up:
            self._pending.append((start, self._now(), tokens, padded, labels, shapes))

    @contextlib.contextmanager
    def live_tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """On the CPU, count the tensors of one step of the warm-up: the second, which has the optimizer's state."""
        if self.device.type != "cpu" or self._seen != 1 or self.warm_up < 2:
            yield
            return
        from lorabench.training.live import LiveTensors

        states = [value for state in optimizer.state.values() for value in state.values()]
        with LiveTensors([*model.parameters(), *model.buffers(), *filter(_is_tensor, states)]) as live:
            yield
        self.peaks["tensor_peak_gib"] = live.peak / GIB

    def flush(self) -> None:
        """Turn the events of the last steps into seconds; waits for the device once."""
        self._synchronize()
        for start, end, tokens, padded, labels, shapes in self._pending:
            self.step_rows.append((self._between(start, end), tokens, padded, labels, shapes))
        self._pending.clear()

    def start_training(self) -> None:
        self.release()
        self._energy.start()

    def release(self, *, collect: bool = True) -> None:
        """Give memory that loading left behind back to the system, so that it is not taken for training's."""
        release_memory(collect=collect)
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def end_training(self) -> None:
        self.flush()
        self.energy_joules += self._energy.stop()

    @contextlib.contextmanager
    def pause_training(self, name: str) -> Iterator[None]:
        """What happens inside is on the clock `name`; its time and energy are not training's."""
        with self.clock(name):
            self.end_training()
            yield
            self._energy.start()

    @property
    def state(self) -> dict[str, Any]:
        self.flush()
        self._tick()
        return {
            "peaks": dict(self.peaks),
            "seconds": dict(self.seconds),
            "step_rows": list(self.step_rows),
            "energy_joules": self.energy_joules + self._energy.joules(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.restore_peaks(state)
        for name, value in state["seconds"].items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        self.step_rows = [(*row, *[()] * (5 - len(row))) for row in state["step_rows"]]  # once they had no shapes
        self.energy_joules = state["energy_joules"]

    def restore_peaks(self, state: dict[str, Any]) -> None:
        self.peaks |= {key: max(value, self.peaks.get(key, 0.0)) for key, value in state["peaks"].items()}

    def wall_time(self) -> dict[str, float]:
        """Seconds by clock, and in total, over all attempts."""
        self._tick()
        named = {f"{name}_seconds": value for name, value in self.seconds.items() if name != "other"}
        return named | {"total_seconds": sum(self.seconds.values())}

    def throughput(self) -> dict[str, float]:
        """Tokens, or images, per second and step times; nothing if no step was past the warm-up."""
        if not self.step_rows:
            return {}
        times, tokens, padded, labels, _ = zip(*self.step_rows, strict=True)
        total = sum(times)
        ordered = sorted(times)
        rates = {
            "tokens_per_second": sum(tokens) / total,
            "padded_tokens_per_second": sum(padded) / total,
            "label_tokens_per_second": sum(labels) / total,
        }
        return (rates if self.unit == "tokens" else {f"{self.unit}_per_second": sum(tokens) / total}) | {
            "step_seconds_median": statistics.median(ordered),
            "step_seconds_p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        }

    def memory(self) -> tuple[dict[str, float], str]:
        """The peaks by their names in MEASURES, and how they were made."""
        training = [self.peaks.get(f"{name}_peak_gib", 0.0) for name in TRAINING_PHASES]
        measures = dict(self.peaks) | {"peak_gib": max(training)}
        if self.device.type == "cuda":
            return measures, "CUDA allocator, peak allocated, reset per phase"
        measures["baseline_gib"] = self.baseline_gib
        reset = "reset per phase" if self._process.can_reset else "not reset: this kernel does not allow it"
        return measures, f"CPU, VmHWM above the resident set before loading, {reset}"

    def energy(self) -> tuple[float, str] | None:
        """Joules of training and their source; None where nothing tells."""
        return (self.energy_joules, self._energy.source) if self._energy.source else None

    def _tick(self) -> None:
        self._synchronize()
        now = self._wall()
        self.seconds[self._running] = self.seconds.get(self._running, 0.0) + now - self._since
        self._since = now

    def _wall(self) -> float:
        """The time that counts, in seconds."""
        return time.perf_counter()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return self._wall()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        """Seconds from one `_now` to another."""
        return float(start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._process.reset_peak()

    def _peak(self, name: str) -> dict[str, float]:
        if self.device.type != "cuda":
            return {f"{name}_peak_gib": max(0.0, self._process.peak() / GIB - self.baseline_gib)}
        import torch

        peaks = {f"{name}_peak_gib": torch.cuda.max_memory_allocated(self.device) / GIB}
        if name != "load":
            peaks["reserved_peak_gib"] = torch.cuda.max_memory_reserved(self.device) / GIB
        return peaks


def _is_tensor(value: Any) -> bool:
    import torch

    return torch.is_tensor(value)


def release_memory(*, collect: bool = True) -> None:
    """Give freed memory back to the system, as far as the C library can.

    `collect` finds what only cycles keep, such as a model; it takes half a second with all libraries loaded.
    """
    if collect:
        gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Have the C library (glibc) keep what a step frees for the next step, until `release_memory`.

    It gives the top of its heap back whenever much of it is free, which each step would fault in anew, page by page.
    """
    with contextlib.suppress(OSError, AttributeError):
        for parameter, size in ((M_TRIM_THRESHOLD, GIB), (M_MMAP_THRESHOLD, 32 * 2**20)):
            ctypes.CDLL(None).mallopt(parameter, size)


class _Process:
    """This process's resident set, as the kernel counts it (bytes)."""

    def __init__(self) -> None:
        self._status = os.open("/proc/self/status", os.O_RDONLY) if os.path.exists("/proc/self/status") else None
        self._clear = None
        with contextlib.suppress(OSError):
            self._clear = os.open("/proc/self/clear_refs", os.O_WRONLY)
        self.can_reset = self.reset_peak()

    def reset_peak(self) -> bool:
        if self._clear is None:
            return False
        try:
            return os.pwrite(self._clear, b"5", 0) == 1
        except OSError:
            return False

    def peak(self) -> int:
        return self._field(rb"VmHWM:\s+(\d+) kB")

    def resident(self) -> int:
        return self._field(rb"VmRSS:\s+(\d+) kB")

    def _field(self, pattern: bytes) -> int:
        if self._status is None:
            return 0
        found = re.search(pattern, os.pread(self._status, 4096, 0))
        return int(found[1]) * 1024 if found else 0


class EnergyCounter:
    """Joules since `start()`: NVML's total counter of the GPU, else RAPL's package counters of the CPU."""

    def __init__(self, device: torch.device):
        self.source = ""
        self._read: Any = None
        self._begin: float | None = None
        if device.type == "cuda":
            self._open_nvml(device)
        else:
            self._open_rapl()

    def start(self) -> None:
        self._begin = self._read() if self._read else None

    def joules(self) -> float:
        """So far; 0 where it is not running."""
        return self._read() - self._begin if self._read and self._begin is not None else 0.0

    def stop(self) -> float:
        """The joules since `start()`; counts no more."""
        joules, self._begin = self.joules(), None
        return joules

    def _open_nvml(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError:
            return
        import torch

        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except (AttributeError, pynvml.NVMLError):
            return
        self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        self.source = "NVML total energy counter of the GPU"

    def _open_rapl(self) -> None:
        files = sorted(Path("/sys/class/powercap").glob("intel-rapl:[0-9]*/energy_uj"))
        files = [file for file in files if file.parent.name.count(":") == 1 and os.access(file, os.R_OK)]
        if files:
            begin = [int(file.read_text()) for file in files]
            spans = [int(file.with_name("max_energy_range_uj").read_text()) for file in files]
            self._read = lambda: (
                sum(
                    (int(f.read_text()) - b) % span  # a counter that has wrapped around once
                    for f, b, span in zip(files, begin, spans, strict=True)
                )
                / 1e6
            )
            self.source = "RAPL package counters of the whole CPU (they wrap around about every hour)"
