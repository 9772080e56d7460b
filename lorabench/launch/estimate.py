"""What a run will take, by the shape of all that it computes: its memory, and the time of each of its parts.

A pass is gone through without numbers, on torch's meta device (`lorabench.training.flops.profile`): its FLOPs, the
bytes that its operations write, and their number give its time, and what it keeps for the backward pass its memory.
How long examples are is seen in the data.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from lorabench.config.decode import InputError
from lorabench.spec.measures import BATCH_SIZES, NUM_RESIDENT
from lorabench.spec.run_spec import RunSpec
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from lorabench.training import inference
from lorabench.training.data_check import Lengths, tokens_of
from lorabench.training.flops import Cost, Profile, Shape
from lorabench.training.meter import GIB
from lorabench.training.peak import PEAK_FLOPS, peak_flops
from lorabench.training.predictions import CHUNK_BYTES, by_tokens

BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 0.5 + 1 / 64}
"""Of a weight; nf4 with an 8-bit scale for each block of 64."""
USUAL_GPU = "A100"
"""What a GPU that is neither here nor known by its name is taken for."""
CPU_OVERHEAD_BYTES = 0.04 * GIB
"""What a process on the CPU takes beside its tensors: the libraries' own buffers."""
HELD = {"cpu": 1.5, "cuda": 1.0}
"""Times what a pass keeps: of memory that comes and goes the C library gives some back late."""
OWN_OPERATIONS = 60
"""What a step of a run in a pack takes by itself, counted in operations: its batch, its loss, its log."""
PARTS = ("load", "train", "evaluate", "generate", "serve", "save")
"""Of a run's time. `save` is all that has no clock of its own: counting, keeping ΔW, the record."""
NEAREST = 8
"""Finished runs that an estimate is held against: those nearest to it in size, of the most similar kind there is."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How fast a device is; `operation` is what it takes to ask for one."""

    rate: float
    """FLOP per second of a model's matrix products."""
    written: float
    """Bytes per second that operations write."""
    read: float
    """Bytes per second of weights, where few tokens go through them."""
    operation: float
    """Seconds."""
    overlaps: bool
    """Whether the device computes while the next operation is asked for."""

    def seconds(self, cost: Cost) -> float:
        asking, computing = cost.operations * self.operation, cost.flops / self.rate + cost.written / self.written
        return max(asking, computing) if self.overlaps else asking + computing


EFFICIENCY = {"cpu": 0.6, "cuda": 0.4}
"""Share of the fastest product's rate that a model's products reach. On the CPU measured: `benchmarks/plan.py`."""
WRITTEN = {"cpu": 20e9, "cuda": 600e9}
READ = {"cpu": 10e9, "cuda": 1500e9}
OPERATION = {"cpu": 9.5e-6, "cuda": 9e-6}


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a model with its method attached says without weights; equal for runs that differ in other keys."""

    num_parameters: int
    num_trainable: int
    num_tensors: int
    """That are trained."""
    weight_bytes: float
    moment_bytes: float
    """Of what the optimizer keeps."""
    layers: int
    width: int
    inner: int
    vocabulary: int
    """Logits of a token; 0 where only one position gives any."""
    step_flops: Callable[[Shape, int], float]
    """Of a step with so many passes of a shape."""
    profile: Callable[[Shape], Profile]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one run: peak memory of training in GiB, and wall time of its parts in seconds."""

    tensors_gib: float
    overhead_gib: float
    seconds_of: dict[str, float] = field(default_factory=dict)

    @property
    def peak_gib(self) -> float:
        return self.tensors_gib + self.overhead_gib

    @property
    def train_seconds(self) -> float:
        return self.seconds_of["train"]

    @property
    def seconds(self) -> float:
        return sum(self.seconds_of.values())


def formula(
    spec: RunSpec, counts: Counts, device: torch.device, gpu: str | None = None, *, first: bool = True
) -> Estimate:
    """From first principles. `first`: the untouched base is evaluated too, which later runs of a store need not do.

    Memory: weights; for what trains its gradient in float32, and what the optimizer keeps (AdamW two moments); what the
    longest batch keeps for the backward pass (only the layers' inputs and one layer's share with gradient
    checkpointing); the logits that are there at a time, their log-softmax and gradient in float32.
    """
    machine, passes = machine_of(spec, device, gpu), _Passes(spec, counts)
    kept = passes.profile.kept * BYTES[spec.dtype] / 4 * passes.longest / passes.usual
    if spec.gradient_checkpointing:
        kept = kept / counts.layers + counts.layers * counts.width * BYTES[spec.dtype] * passes.micro * passes.longest
    logits = 4 * counts.vocabulary * passes.micro * passes.longest_last
    if by_tokens(spec.task):
        logits = min(logits, CHUNK_BYTES["cuda" if device.type == "cuda" else "cpu"])
    held = HELD["cuda" if device.type == "cuda" else "cpu"] * (kept + 3 * logits)
    tensors = counts.weight_bytes + 4 * counts.num_trainable + counts.moment_bytes + held
    parts = {
        "load": 0.1 + counts.weight_bytes / 1e9,
        "train": spec.total_steps * passes.step_seconds(machine),
        "evaluate": passes.evaluation_seconds(machine, first),
        "generate": passes.writing_seconds(machine, first),
        "serve": passes.serving_seconds(machine) if spec.serving else 0.0,
        "save": passes.saving_seconds(updates_bytes(spec, counts)),
    }
    overhead = CPU_OVERHEAD_BYTES / GIB if device.type == "cpu" else 0.0
    return Estimate(tensors_gib=tensors / GIB, overhead_gib=overhead, seconds_of=parts)


class _Passes:
    """The passes of a run, all held against one that is gone through: of a step's part, as long as that usually is."""

    def __init__(self, spec: RunSpec, counts: Counts):
        self.spec, self.counts = spec, counts
        self.micro = spec.micro_batch_size or spec.batch_size
        self.padded = 1 if spec.padding == "free" else self.micro
        """Examples that are made as long as the longest of them."""
        most = spec.objective.longest(spec)
        self.stages = [tokens.splits for tokens in tokens_of(spec)]
        trained = [splits["train"] for splits in self.stages if "train" in splits]
        if spec.objective.writes or not trained:
            shape, longest = most, most
        else:
            usual = [lengths.padded(self.padded, shuffled=True) for lengths in trained]
            shape = tuple(round(sum(each) / len(each)) for each in zip(*usual, strict=True))
            longest = tuple(map(max, zip(*(lengths.longest for lengths in trained), strict=True)))
        self.profile = counts.profile((self.micro, *(max(1, length) for length in shape)))
        self.usual, self.longest, self.longest_last = max(1, sum(shape)), sum(longest), longest[-1]

    def _forward(self, positions: float, share: float = 1.0) -> Cost:
        """A forward pass over so many positions and the loss of that share of them, and what a batch is made by."""
        loss = Cost(written=12.0 * self.counts.vocabulary * positions * share, operations=60)
        return self.profile.forward.at(positions / (self.micro * self.usual)) + loss

    def step_seconds(self, machine: Machine) -> float:
        """Of an optimizer step: its passes, and AdamW and clipping, tensor by tensor."""
        counts, logits = self.counts, self.counts.vocabulary * self.micro * self.usual
        part = self.profile.both + Cost(written=16.0 * logits, operations=100)
        update = Cost(written=24.0 * counts.num_trainable, operations=18 * counts.num_tensors + 100)
        num_parts = max(1, self.spec.batch_size // self.micro)
        return num_parts * machine.seconds(part) + machine.seconds(update)

    def _split_seconds(self, machine: Machine, lengths: Lengths) -> float:
        usual = sum(lengths.padded(self.padded))
        return math.ceil(lengths.count / self.micro) * machine.seconds(self._forward(self.micro * usual))

    def evaluation_seconds(self, machine: Machine, first: bool) -> float:
        """Validation of every task after each, and of the base before; the other splits at the end."""
        spec = self.spec
        of = [{split: self._split_seconds(machine, lengths) for split, lengths in each.items()} for each in self.stages]
        validation = sum(each.get("validation", 0.0) for each in of)
        retained = sum(value for each in of for split, value in each.items() if split.startswith("retain"))
        tested = sum(value for each in of[-1:] for split, value in each.items() if split.startswith("test"))
        periodic = (spec.steps - 1) // spec.eval_every if spec.eval_every else 0
        total = len(of) * validation + periodic * validation + retained + tested
        return total + (validation + retained if first else machine.seconds(self._forward(self.usual)))

    def writing_seconds(self, machine: Machine, first: bool) -> float:
        """As if every answer were as long as it may be."""
        task = self.spec.stages[-1]
        found = 0.0
        for split in task.generation.measured_splits if task.generation else ():
            if task.generation and (lengths := self.stages[-1].get(split)):
                size = min(task.generation.batch_size, lengths.count)
                prompt = machine.seconds(self._forward(size * sum(lengths.padded(size)), share=0.0))
                batch = prompt + task.generation.max_new_tokens * self._token_seconds(machine, size)
                found += math.ceil(lengths.count / size) * batch
        return found * (2 if first else 1)

    def _token_seconds(self, machine: Machine, size: int) -> float:
        """Of a token of every row of a batch, with what `generate` does for it."""
        weights = self.counts.weight_bytes / machine.read
        forward = self.profile.forward.at(size / (self.micro * self.usual))
        forward += Cost(written=12.0 * self.counts.vocabulary * size)
        return machine.seconds(forward) + weights + 110 * machine.operation

    def serving_seconds(self, machine: Machine) -> float:
        """Races of base, unmerged and merged model at each batch size, and of adapters; loading several of them."""
        length = max((sum(each["validation"].longest) for each in self.stages if "validation" in each), default=1)
        models = 2 if self.spec.method.trains_base else 3
        total = 0.3
        for size in BATCH_SIZES:
            prompt = machine.seconds(self._forward(size * length, share=0.0))
            decode = inference.NEW_TOKENS * self._token_seconds(machine, size)
            total += _race_seconds(models * (prompt + decode))
        if self.spec.method.holds_several:
            forward = machine.seconds(self._forward(max(BATCH_SIZES) * length, share=0.0))
            total += NUM_RESIDENT * 15 * self.counts.num_tensors * machine.operation + _race_seconds(2 * forward)
        return total

    def saving_seconds(self, updates: float) -> float:
        """FLOPs are counted, of several shapes where batches differ; ΔW is written and hashed."""
        differ = any(lengths.differ for each in self.stages for lengths in each.values())
        counting = (5 if differ else 1) * self.profile.both.operations * 15e-6
        reading = 2 * self.counts.weight_bytes / 1e9 if self.spec.method.trains_base else 0.0
        return 0.08 + counting + updates / 200e6 + reading


def _race_seconds(round_seconds: float) -> float:
    rounds = min(inference.MAX_ROUNDS * round_seconds, inference.SECONDS)
    return round_seconds + max(inference.MIN_ROUNDS * round_seconds, rounds)


def pack_seconds(spec: RunSpec, counts: Counts, device: torch.device, size: int, gpu: str | None = None) -> float:
    """A step of each of so many such runs on one base, in one pass; 1: of a run alone."""
    machine, passes = machine_of(spec, device, gpu), _Passes(spec, counts)
    if size == 1:
        return passes.step_seconds(machine)
    logits, num_parts = counts.vocabulary * passes.micro * passes.usual, max(1, spec.batch_size // passes.micro)
    part = passes.profile.both.at(size) + Cost(written=16.0 * logits * size, operations=100)
    update = Cost(written=24.0 * counts.num_trainable * size, operations=100)
    own = Cost(operations=OWN_OPERATIONS)
    return (num_parts * machine.seconds(part) + machine.seconds(update)) / size + machine.seconds(own)


def pack_bytes(spec: RunSpec, counts: Counts, device: torch.device, size: int) -> float:
    """Memory of so many such runs on one base: it once, and of each what it trains and keeps for its backward pass."""
    alone = formula(spec, counts, device)
    trained = 12.0 * counts.num_trainable
    kept = alone.tensors_gib * GIB - counts.weight_bytes - trained
    changed = counts.weight_bytes if spec.method.changes_base else 0.0
    return alone.overhead_gib * GIB + counts.weight_bytes + size * (kept + 3 * trained + changed)


def flops_per_step(spec: RunSpec, counts: Counts) -> float:
    """As a run's record has it, where every example is as long as can be."""
    micro = spec.micro_batch_size or spec.batch_size
    return counts.step_flops((micro, *spec.objective.longest(spec)), spec.batch_size // micro)


def updates_bytes(spec: RunSpec, counts: Counts) -> float:
    """About what a run keeps of ΔW on disk in float32, its snapshots included.

    Of `svd:K`, K singular vectors of both sides of every linear layer of the blocks: four of attention, three between.
    """
    whole = 4.0 * counts.num_trainable * spec.method.num_stored(spec)
    if spec.keep.startswith("svd:"):
        sides = counts.layers * (8 * counts.width + 3 * (counts.width + counts.inner))
        whole = min(whole, 4.0 * int(spec.keep.removeprefix("svd:")) * sides)
    num_kept = 1 + ((spec.total_steps - 1) // spec.snapshot_every if spec.snapshot_every else 0)
    return 0.0 if spec.keep == "none" else whole * num_kept


def machine_of(spec: RunSpec, device: torch.device, gpu: str | None = None) -> Machine:
    rate, _ = flop_rate(device, spec.dtype, spec.threads, gpu)
    kind = "cuda" if device.type == "cuda" else "cpu"
    return Machine(
        rate=EFFICIENCY[kind] * rate,
        written=WRITTEN[kind],
        read=READ[kind],
        operation=OPERATION[kind],
        overlaps=kind == "cuda",
    )


@cache
def flop_rate(device: torch.device, dtype: str, threads: int, gpu: str | None = None) -> tuple[float, str]:
    """FLOP per second of a matrix product on this device with so many threads, and how it is known.

    Where this machine has no such device (a login node), by the data sheet of what `gpu` names.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        known = [key for key in PEAK_FLOPS if gpu and key.lower().replace(" ", "_") in gpu.lower().replace("-", "_")]
        rates = PEAK_FLOPS[known[0] if known else USUAL_GPU]
        source = f"data sheet of {known[0] if known else USUAL_GPU}, {dtype}"
        return rates[dtype != "bfloat16"] or rates[1], source if known else f"{source}: taken for want of a better"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return peak_flops(device, dtype)
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A finished run: what the formula says of it, and what it was."""

    expected: Estimate
    peak_gib: float
    seconds_of: dict[str, float]


class History:
    """What the store's finished runs on the same kind of device say of the formula."""

    def __init__(
        self, store: Store, specs: Sequence[RunSpec], count: Callable[[RunSpec], Counts], device: torch.device,
        gpu: str | None = None,
    ):  # fmt: skip
        self.device, self.gpu, self._count = device, gpu, count
        self._known = {spec.id: spec for spec in specs}  # decoded already: thousands take many seconds
        self._bases: set[tuple[object, ...]] = set()
        self._seen: dict[tuple[object, ...], list[_Seen]] = {}
        model_names = {spec.model for spec in specs}
        for state in store.states():
            if state.status == Status.DONE and state.record and state.spec.get("model") in model_names:
                self._learn(state.record)

    def _learn(self, record: RunRecord) -> None:
        measures = record.measures
        needed = ("peak_gib", "train_seconds", "total_seconds")
        same = record.environment.get("hardware", {}).get("device") == self.device.type
        if not same or not all(measures.get(key) for key in needed):
            return
        if record.environment.get("packed"):  # it tells of its share of others' costs too
            return
        taken = "earlier run" in record.provenance.get("base_valid_loss", "")
        try:
            spec = self._known.get(record.run_id) or RunSpec.from_json(record.spec)
            expected = formula(spec, self._count(spec), self.device, self.gpu, first=not taken)
        except InputError:
            return  # made by another version, or its model or data is gone
        self._bases.add(_base_of(spec))
        clocks = {part: measures.get(f"{part}_seconds", 0.0) for part in PARTS if part != "save"}
        clocks["train"] += measures.get("rollout_seconds", 0.0)
        clocks["save"] = max(0.0, measures["total_seconds"] - sum(clocks.values()))
        seen = _Seen(expected=expected, peak_gib=measures["peak_gib"], seconds_of=clocks)
        for key in _kinds(spec):
            self._seen.setdefault(key, []).append(seen)

    def estimate(self, spec: RunSpec, counts: Counts) -> dict[str, object]:
        """Of a run that is planned after all those that were asked about before."""
        first = _base_of(spec) not in self._bases
        self._bases.add(_base_of(spec))
        expected, basis = formula(spec, counts, self.device, self.gpu, first=first), "formula"
        key = next((key for key in _kinds(spec) if key in self._seen), None)
        seen = self._seen[key] if key is not None else []
        if seen:
            expected, basis = _corrected(expected, seen), "similar runs"
        return {
            "num_parameters": counts.num_parameters,
            "num_trainable": counts.num_trainable,
            "updates_bytes": updates_bytes(spec, counts),
            "peak_gib": expected.peak_gib,
            "seconds": expected.seconds,
            "seconds_of": expected.seconds_of,
            "basis": basis,
            "num_similar": len(seen),
        }


def _base_of(spec: RunSpec) -> tuple[object, ...]:
    """Runs that have this in common evaluate the untouched base once."""
    size = spec.micro_batch_size or spec.batch_size
    return spec.model, spec.revision, spec.stages, spec.seq_len, spec.dtype, spec.quantization, spec.threads, size


def _kinds(spec: RunSpec) -> list[tuple[object, ...]]:
    """From the most similar runs to the least."""
    full = (spec.model, spec.objective.name, spec.task.name, spec.method.name, spec.quantization)
    return [full, full[:4], full[:3], full[:2], full[:1]]


def _corrected(expected: Estimate, seen: Sequence[_Seen]) -> Estimate:
    """By the median ratio of each part to the formula, over the runs that are nearest in that part's size.

    In memory, what small runs take beside their tensors is a sum, and no factor for large ones.
    """
    parts = {
        part: value
        * _ratio(value, [(run.expected.seconds_of[part], run.seconds_of[part]) for run in seen])
        for part, value in expected.seconds_of.items()
    }  # fmt: skip
    near = sorted(seen, key=lambda run: _apart(run.expected.tensors_gib, expected.tensors_gib))[:NEAREST]
    limit = 10 * expected.overhead_gib
    beside = statistics.median(min(max(run.peak_gib - run.expected.tensors_gib, 0.0), limit) for run in near)
    pairs = [(run.expected.tensors_gib + beside, run.peak_gib) for run in near]
    factor = _ratio(expected.tensors_gib + beside, pairs)
    return Estimate(tensors_gib=factor * expected.tensors_gib, overhead_gib=factor * beside, seconds_of=parts)


def _ratio(size: float, pairs: Iterable[tuple[float, float]]) -> float:
    """Median of measured over expected, of the pairs whose expected value is nearest to `size`; 1 where none tells."""
    known = sorted((pair for pair in pairs if min(pair) > 0), key=lambda pair: _apart(pair[0], size))[:NEAREST]
    return statistics.median(measured / expected for expected, measured in known) if known and size else 1.0


def _apart(a: float, b: float) -> float:
    return abs(math.log(a / b)) if a > 0 and b > 0 else math.inf
