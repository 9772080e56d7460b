"""Several runs on one base, in one forward and backward pass: one that ends, well or not, leaves the others.

Each run is the generator that it is alone (`lorabench.training.run`), and does for itself all that is its own. Where
all wait for a pass their batches are computed as one, and each is sent its own loss. A run's random numbers are its
own: torch's generators are set to where they were whenever it goes on by itself, and its dropout is drawn from its own
generator as torch would draw it.

Shapes: K runs, n examples of t positions in a pass of each.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.spec.task import IGNORE, LanguageModeling, Task, Told
from lorabench.training.base import SharedBase, twin
from lorabench.training.evaluation import score_of
from lorabench.training.examples import PIXELS, Batch, Examples, collate, moved, reader
from lorabench.training.packed.layer import Factors, Head, Lanes, PackedHead, PackedLinear, Unpackable
from lorabench.training.packed.meter import Clock, Shares
from lorabench.training.packed.rows import Rows
from lorabench.training.passes import autocast, forward
from lorabench.training.predictions import PLACES, by_tokens, log_probs, look_at_head, places, told
from lorabench.training.state import Score, Training, random_state, set_random_state
from lorabench.training.step import Own, Pass, alone
from lorabench.training.stop import Stop

LAYERS = ("Linear", "Linear4bit", "Linear8bitLt")
"""What factors can be packed on."""


class Seat:
    """A run in a pack: what it asks for, and what becomes of it."""

    def __init__(self, run: Generator[Pass | Own, Any, Any], clock: Clock, device: torch.device):
        self.run, self.clock, self.device = run, clock, device
        self.request: Pass | Own | None = None
        self.result: Any = None
        self.generator = torch.Generator(device)
        self._random: dict[str, Tensor] = {}

    @property
    def training(self) -> Training:
        assert self.request is not None
        return self.request.training

    def go_on(self, answer: Any = None) -> None:
        """Until the run's next request, None where it has ended."""
        with self.clock.running(), self._ending():
            self.request = self.run.send(answer)

    def fail(self, error: Exception) -> None:
        """What the run has asked for has failed: it says what becomes of it."""
        with self.clock.running(), self._ending():
            self.request = self.run.throw(error)

    def go_on_alone(self) -> None:
        """To the run's end."""
        with self.random(), self.clock.running():
            self.request, self.result = None, alone(self.run, self.request)

    @contextlib.contextmanager
    def random(self) -> Iterator[None]:
        """torch's generators are the run's inside; from its beginning on they are what it has made of them."""
        if self._random:
            self._random[self.device.type] = self.generator.get_state()
            set_random_state(self._random, self.device)
        yield
        self._random = random_state(self.device)
        self.generator.set_state(self._random[self.device.type])

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except StopIteration as end:
            self.request, self.result = None, end.value


class Pack:
    """Computes runs together as long as there are several, on a base that they share."""

    def __init__(self, shares: Shares, checkpoint_seconds: float, stops: Sequence[Stop] = ()):
        self.shares, self.checkpoint_seconds, self.stops = shares, checkpoint_seconds, stops
        self.is_due = False
        """Whether the runs are to write a checkpoint after this step: all after the same, so that they go on alike."""
        self._last_checkpoint = time.monotonic()
        self._seats: list[Seat] = []
        """Whose rows `_rows` are, in order."""
        self._stale: set[Seat] = set()
        """Of these, who has had its model for itself since the last pass."""
        self._rows: Rows | None = None
        self._model: PackedModel | None = None

    def carry_out(self, seats: Sequence[Seat]) -> list[Any]:
        """What each run returns."""
        for seat in seats:
            self._own(seat)
        while waiting := [seat for seat in seats if seat.request is not None]:
            self.shares.size = len(waiting)
            if looking := [seat for seat in waiting if isinstance(seat.request, Own)]:
                self._evaluate(looking)
                for seat in looking:
                    self._own(seat)
            elif len(waiting) == 1:
                self._pull(waiting)
                waiting[0].go_on_alone()
            else:
                self._step(waiting)
        return [seat.result for seat in seats]

    def _own(self, seat: Seat) -> None:
        """Let a run go on with its own model."""
        with seat.clock.running():
            self._pull([seat])
        with seat.random():
            seat.go_on()
        if seat.request is not None:
            seat.training.scored.clear()

    def _pull(self, seats: Sequence[Seat]) -> None:
        """Give runs what they hold, where the rows have newer."""
        for row, seat in enumerate(self._seats):
            if seat in seats and seat not in self._stale and self._rows:
                self._rows.pull(row)
                self._stale.add(seat)

    def _gather(self, seats: list[Seat]) -> tuple[Rows, PackedModel]:
        """Rows of these runs, as they are now, and the model on them."""
        if self._model is None:
            self._model = PackedModel(seats[0].training)
        if self._rows is None or self._seats != seats:
            self._pull(self._seats)
            self._rows, self._seats = Rows([seat.training for seat in seats]), seats
            self._stale = set(seats)
            self._model.put(self._rows.layers, self._rows.heads)
        for row, seat in enumerate(seats):
            if seat in self._stale:
                self._rows.push(row)
        self._stale.clear()
        return self._rows, self._model

    def _step(self, seats: list[Seat]) -> None:
        """A step of all, in one pass and one update; apart where they cannot be together."""
        begin, before = time.perf_counter(), [seat.generator.get_state() for seat in seats]
        try:
            rows, model = self._gather(seats)
            with self.shares.whole.phase("forward_backward"):
                losses = model.losses_and_gradients(seats)
        except (Unpackable, torch.OutOfMemoryError) as error:
            for seat, state in zip(seats, before, strict=True):
                seat.generator.set_state(state)
            self._part(seats, error)
            return
        except Exception as error:
            for seat in seats:
                seat.fail(error)
            return
        with self.shares.whole.phase("optimizer"):
            norms = rows.step()
        self.shares.deal()
        elapsed = time.perf_counter() - begin
        self._look_at_the_clock()
        for seat in seats:
            seat.clock.seconds += elapsed / len(seats)
        for seat, loss, norm in zip(seats, losses, norms, strict=True):
            seat.go_on((loss, norm))

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        self.is_due = now - self._last_checkpoint >= self.checkpoint_seconds
        if self.is_due:
            self._last_checkpoint = now

    def _is_to_stop(self) -> bool:
        return any(stop.reason is not None for stop in self.stops)

    def _part(self, seats: Sequence[Seat], why: Exception) -> None:
        """From here on one run after another: each may be smaller alone than all were together."""
        print(f"not in one pass: {type(why).__name__}: {why}")
        self._pull(seats)
        self._rows = self._model = None
        self._seats, self.shares.size = [], 1
        for seat in seats:
            seat.go_on_alone()

    def _evaluate(self, seats: list[Seat]) -> None:
        """Compute what runs are about to evaluate, where they are about to evaluate the same."""
        requests = [seat.request for seat in seats]
        splits = next(request.splits for request in requests if isinstance(request, Own))
        alike = all(isinstance(request, Own) and request.splits == splits for request in requests)
        if not (splits and alike and self._seats == seats and self._model):
            return
        begin = time.perf_counter()
        with contextlib.suppress(torch.OutOfMemoryError):  # then each does it by itself
            for examples, split in splits:
                found = [*self._model.scores(len(seats), examples, split, self._is_to_stop)]
                if not self._is_to_stop():
                    for seat, scores in zip(seats, zip(*found, strict=True), strict=True):
                        seat.training.scored[examples.task, split] = [*scores]
        for seat in seats:
            seat.clock.seconds += (time.perf_counter() - begin) / len(seats)


class PackedModel:
    """The base with all runs' factors on it."""

    def __init__(self, training: Training):
        base = training.base
        assert isinstance(base, SharedBase)
        self.spec, self.device, self.lanes = training.spec, base.device, Lanes()
        self.lanes.hook = self.lanes.hook.detach().to(self.device).requires_grad_()
        self.model = twin(base.whole).requires_grad_(False)
        examples = training.examples
        if by_tokens(examples.task):
            look_at_head(self.model, collate(examples.splits["train"][:1], examples.padding, self.device))
        if self.spec.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def put(self, layers: dict[str, list[Factors]], heads: dict[str, list[Head]]) -> None:
        """Have these factors on the base from now on, and no others, and these heads in the place of its own."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, PackedLinear) and name not in layers:
                self.model.set_submodule(name, module.base_layer)
        for name, groups in layers.items():
            layer = self.model.get_submodule(name)
            if not isinstance(layer, PackedLinear):
                if type(layer).__name__ not in LAYERS:
                    raise Unpackable(f"{name} is a {type(layer).__name__}")
                layer = PackedLinear(layer, self.lanes)
                self.model.set_submodule(name, layer)
            layer.groups = groups
        for name, of_runs in heads.items():
            head = self.model.get_submodule(name)
            if not isinstance(head, PackedHead):
                head = PackedHead(head, self.lanes)
                self.model.set_submodule(name, head)
            head.groups = of_runs

    def losses_and_gradients(self, seats: Sequence[Seat]) -> list[Tensor]:
        """Each run's loss of its step; its gradients are added up in its row."""
        if not self.model.training:  # module by module it takes a fiftieth of a step
            self.model.train()
        requests = [seat.request for seat in seats if isinstance(seat.request, Pass)]
        self.lanes.generators = [seat.generator for seat in seats]
        totals = torch.zeros(len(requests), device=self.device)
        examples = requests[0].training.examples
        for parts in zip(*(request.parts for request in requests), strict=True):
            sums = self._sums(parts, examples)
            losses = [request.batches.share(each) for request, each in zip(requests, sums, strict=True)]
            torch.stack(losses).sum().backward()
            totals += torch.stack(losses).detach()
        return [*totals]

    def _sums(self, parts: Sequence[Batch], examples: Examples) -> Sequence[Tensor]:
        """Of each run the loss of its own batch, summed over what is predicted."""
        task = _shared(examples.task)
        batch = self._together(parts, examples.padding, task)
        with autocast(self.spec, self.device):
            if by_tokens(task):
                nats = -log_probs(self.model, batch, task.targets(batch), 1.0)
                return [*nats.unflatten(0, (len(parts), -1)).flatten(1).sum(1)]
            logits = forward(self.model, batch).chunk(len(parts))
            own = [moved(part, self.device) for part in parts]
            return [task.loss(each, part) for each, part in zip(logits, own, strict=True)]

    @torch.no_grad()
    def scores(
        self, num_runs: int, examples: Examples, split: str, is_to_stop: Callable[[], bool]
    ) -> Iterator[list[Score]]:
        """Of each batch of a split, that of each run, as `evaluation.scores_of` has it."""
        self.model.eval()
        rows, size = examples.splits.get(split, []), self.spec.micro_batch_size or self.spec.batch_size
        task = _shared(reader(examples.task, split))
        for first in range(0, len(rows), size):
            if is_to_stop():
                return
            batch = collate(rows[first : first + size], examples.padding, torch.device("cpu"))
            whole, own = self._together([batch] * num_runs, examples.padding, task), moved(batch, self.device)
            with autocast(self.spec, self.device):
                if by_tokens(task):
                    found = told(self.model, whole, task.asked(whole))
                    of_runs = zip(*(each.chunk(num_runs) for each in found), strict=True)
                    yield [score_of(task, Told(*each), own) for each in of_runs]
                else:
                    logits = forward(self.model, whole).chunk(num_runs)
                    yield [(float(task.loss(y, own)), task.count(own), task.score(y, own)) for y in logits]

    def _together(self, parts: Sequence[Batch], padding: int, task: Task) -> Batch:
        """The runs' batches in one, padded to the longest, on the device; told to the layers."""
        whole = joined(parts, padding)
        self.lanes.num_rows = len(whole["labels"])
        self.lanes.lengths = [0 if PIXELS in part else part["input_ids"].shape[1] for part in parts]
        return moved(whole | ({PLACES: places(task.asked(whole))} if by_tokens(task) else {}), self.device)


def _shared(task: Task) -> Task:
    """The same. Unpackable where it looks at the logits of tokens, whose places padding would move."""
    if isinstance(task, LanguageModeling) and not by_tokens(task):
        raise Unpackable(f"{task.name} has a loss or scores of its own")
    return task


def joined(parts: Sequence[Batch], padding: int) -> Batch:
    """Batches one after another, padded on the right to the longest; no attention mask where nothing is padded."""
    if PIXELS in parts[0]:
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    lengths = [part["input_ids"].shape[1] for part in parts]
    is_padded = min(lengths) < max(lengths) or any("attention_mask" in part for part in parts)
    fill = {"input_ids": padding, "labels": IGNORE}
    keys = [key for key in parts[0] if key not in ("attention_mask", PLACES)]
    found = {key: torch.cat([_padded(part[key], max(lengths), fill.get(key, 0)) for part in parts]) for key in keys}
    if is_padded:
        masks = [part.get("attention_mask", torch.ones_like(part["input_ids"])) for part in parts]
        found["attention_mask"] = torch.cat([_padded(mask, max(lengths), 0) for mask in masks])
    return found


def _padded(tensor: Tensor, length: int, value: int) -> Tensor:
    if tensor.ndim == 1 or tensor.shape[1] == length:
        return tensor
    return nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=value)
