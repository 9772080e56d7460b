"""An adapter moved by data alone: what it answers to prompts that a base makes, taught to a new one (Trans-LoRA).

Wang et al. 2024, arXiv 2405.17258, section 3 and algorithm 1. A generator that is shown a handful of the task's prompts
writes more of them. A discriminator, the source base with an adapter of its own, has learned to tell the task's prompts
from made ones (equation 1), and lets pass what it takes for the task's: p("yes" | t(x)) > p("no" | t(x)). The source
base with the adapter answers those, and the new adapter learns the answers as a set of data.

    FOLDER/examples  discriminator  prompts    each made once, and taken up again: data to train on, as JSON lines
    FOLDER/runs/<run_id>                       what was trained on them: runs as any other

Where the generator is trained on the examples (`generator_steps`), that is a run too. The new adapter's settings are
the old run's; answers are greedy. The paper generates until there are enough; here at most ATTEMPTS times as many.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from lorabench.adapters.compression.compressible import Subject, open_subject
from lorabench.adapters.moving.prompts import Made, as_question, asks, drawn_texts, stems
from lorabench.adapters.moving.recovery import updates_of
from lorabench.adapters.moving.transfer import Moved, Transfer
from lorabench.config.decode import InputError
from lorabench.config.durable import write_bytes, write_json
from lorabench.config.json_file import read_json
from lorabench.config.quote import clip, show_path
from lorabench.models.base_model import load_tokenizer, max_length
from lorabench.models.weights import add_update
from lorabench.spec.generate import Generate
from lorabench.spec.move import BY_DATA, Distillation
from lorabench.spec.run_spec import RunSpec, method_seed
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from lorabench.tasks.completion import Completion
from lorabench.tasks.multiple_choice import MultipleChoice
from lorabench.training.base import seeded_base
from lorabench.training.evaluation import scores_of
from lorabench.training.examples import Examples, prepare_stages, read_usable
from lorabench.training.execute import Options, execute
from lorabench.training.generation import answers
from lorabench.training.objectives.supervised import Supervised
from lorabench.updates.update import Update

ATTEMPTS = 20
HELD_OUT = 5
"""Of the discriminator's prompts one in so many is held out, to tell how often it is right."""
BATCH = 64
CHOICES = ["yes", "no"]


@dataclass(kw_only=True, eq=False)
class Distiller:
    """Of one adapter and one new base; `folder` keeps all that is made on the way."""

    transfer: Transfer
    how: Distillation
    folder: Path
    device: torch.device
    note: Callable[[str], None]

    def __post_init__(self) -> None:
        subject, spec = self.transfer.subject, self.transfer.subject.spec
        if spec is None:
            raise InputError(f"--by {BY_DATA}: needs the task's own prompts: give --like RUN")
        task = spec.stages[-1]
        if not isinstance(task, Completion):
            has = f"{subject.name} is of task {task.name}"
            raise InputError(f"--by {BY_DATA}: makes prompts to answer, as task completion has them; {has}")
        self.spec = replace(
            spec, model=self.transfer.source_name, revision=self.transfer.revision, task=task, tasks=(),
            objective=Supervised(), eval_every=None, snapshot_every=None, keep="updates",
            serving=False,
        )  # fmt: skip
        self.task = task
        self.store = Store(self.folder)
        if subject.own:  # the new adapter is of the same method: found out before anything is trained
            _check_factors(subject, updates_of(subject, self.transfer.source))

    def moved(self) -> tuple[list[Moved], dict[str, Any]]:
        """The new adapter's ΔW, and what its record says of how it came about."""
        known = self._prompts()
        self.note(f"{known['prompts_kept']} of {known['prompts_made']} prompts are kept")
        spec = self._student
        record = self._train(spec, "the new adapter")
        student = open_subject(self.store, record.run_id)
        modules = list(updates_of(student, self.transfer.target))
        _check_factors(student, modules)
        moved = [Moved(partner=each.layer, B=each.B, A=each.A, row={}) for each in modules if each.A is not None]
        return moved, known | {"student": record.run_id, "steps": spec.steps, "lr": spec.lr}

    @cached_property
    def _student(self) -> RunSpec:
        """The run's own, on the new base and the prompts that were kept."""
        task = Completion(data=self._data("prompts"))
        steps, lr = self.how.steps or self.spec.steps, self.how.lr or self.spec.lr
        return replace(self.spec, model=self.transfer.to, revision=None, task=task, steps=steps, lr=lr)

    @cached_property
    def _real(self) -> list[str]:
        """The task's training prompts, each once."""
        rows = read_usable(self.task).rows["train"][: self.task.max_train]
        return list(dict.fromkeys(self.task.filled(rows)[0]))

    @cached_property
    def _examples(self) -> list[str]:
        """The handful that the generator is shown."""
        count = len(self._real)
        if count <= self.how.examples:
            raise InputError(f"distil.examples = {self.how.examples}: the task has {count} prompts to train on")
        order = np.random.default_rng(method_seed(self.spec, examples=0)).permutation(len(self._real))
        return [self._real[i] for i in order[: self.how.examples]]

    @cached_property
    def _longest(self) -> int:
        """Tokens that a made prompt may have: as the task's longest, of either base."""
        sizes = [
            len(load_tokenizer(name, revision)(text)["input_ids"])
            for name, revision in ((self.spec.model, self.spec.revision), (self.transfer.to, None))
            for text in self._real
        ]
        return min(max(sizes), self.spec.seq_len) + 2

    def _prompts(self) -> dict[str, Any]:
        """Make the data that the new adapter learns from; what is known of how they were made."""
        told = self.folder / "prompts" / "told.json"
        if known := read_json(told):
            return known
        self._make_discriminator()
        discriminator = self._train(self._discriminator, "the discriminator")
        kept, known = self._kept(discriminator.run_id)
        texts = self._answers(kept)
        rows = [{"prompt": prompt, "response": text} for prompt, text in zip(kept, texts, strict=True)]
        self._write("prompts", rows, rows[: self.how.examples])
        held = self._held_out
        right = round(discriminator.measures["valid_accuracy"] * held)
        low, high = stats.binomtest(right, held).proportion_ci(method="exact")
        known |= {
            "discriminator": discriminator.run_id,
            "discriminator_steps": discriminator.spec["steps"],
            "discriminator_accuracy": right / held,
            "discriminator_interval": [float(low), float(high)],
            "discriminator_held_out": held,
        }
        write_json(told, known)
        return known

    @property
    def _name(self) -> str:
        """What the discriminator is told of the task: the last part of its data set's name."""
        return self.task.data.rstrip("/").split("/")[-1].split(":")[-1]

    @property
    def _num_real(self) -> int:
        """Of the task's own prompts that the discriminator sees, and of made ones."""
        return min(self.how.prompts, len(self._real))

    @property
    def _held_out(self) -> int:
        return 2 * max(1, self._num_real // HELD_OUT)

    def _make_discriminator(self) -> None:
        """Its data: as many of the task's own prompts as the source base has made, real and made in turn."""
        if (self.folder / "discriminator" / "train.jsonl").exists():
            return
        made = Made()
        for text in self._drawn("source", 0):
            made.add(text)
            if len(made.texts) >= self._num_real or made.count >= ATTEMPTS * self._num_real:
                break
        if len(made.texts) < self._num_real:
            raise InputError(
                f"{BY_DATA}: of {made.count} texts of {self.spec.model}, {len(made.texts)} are prompts, no two "
                f"the same, and {self._num_real} are needed: train it on more distil.examples first "
                "(distil.generator_steps), or lower distil.prompts"
            )
        order = np.random.default_rng(method_seed(self.spec, discriminator=0)).permutation(len(self._real))
        real = [self._real[i] for i in order[: self._num_real]]
        pairs = itertools.chain.from_iterable(zip(real, made.texts, strict=True))
        rows = [
            {"question": as_question(text, self._name), "choices": CHOICES, "answer": number % 2}
            for number, text in enumerate(pairs)
        ]
        self._write("discriminator", rows[self._held_out :], rows[: self._held_out])

    @cached_property
    def _discriminator(self) -> RunSpec:
        """The source base and an adapter as the run's, whose answer to a prompt is one of two words."""
        tokenizer = load_tokenizer(self.spec.model, self.spec.revision)
        task = MultipleChoice(data=self._data("discriminator"))
        usable = read_usable(task).rows
        texts = [row["question"] for rows in usable.values() for row in rows]
        words = max(len(tokenizer(f" {choice}")["input_ids"]) for choice in CHOICES)
        longest = max(len(tokenizer(text)["input_ids"]) for text in texts)
        return replace(self.spec, task=task, seq_len=longest + words + 2)

    def _kept(self, run_id: str) -> tuple[list[str], dict[str, Any]]:
        """The prompts that the discriminator takes for the task's, and how many were made for them."""
        model = self.loaded_discriminator(run_id)
        made = Made()
        kept: list[str] = []
        drawn = self._drawn(self.how.generator, 1)
        while len(kept) < self.how.prompts and made.count < ATTEMPTS * self.how.prompts:
            before = len(made.texts)
            for text in itertools.islice(drawn, BATCH):
                made.add(text)
            new = made.texts[before:]
            kept += [text for text, is_real in zip(new, self.taken(model, new), strict=True) if is_real]
        known = {
            "examples": self.how.examples,
            "generator": self.how.generator,
            "generator_steps": self.how.generator_steps,
            "prompts_wanted": self.how.prompts,
            "prompts_made": made.count,
            "prompts_without_end": made.endless,
            "prompts_repeated": made.repeated,
            "prompts_kept": min(len(kept), self.how.prompts),
            "kept_share": len(kept) / max(1, len(made.texts)),
        }
        if len(kept) < 2:
            raise InputError(
                f"{BY_DATA}: the discriminator takes {len(kept)} of {made.count} made prompts for the task's, too few "
                "to learn from: show the generator more distil.examples, or train it on them (distil.generator_steps)"
            )
        return kept[: self.how.prompts], known

    def loaded_discriminator(self, run_id: str) -> nn.Module:
        return self._model(self._discriminator, open_subject(self.store, run_id))

    @torch.no_grad()
    def taken(self, model: nn.Module, texts: list[str]) -> list[bool]:
        """Of which p("yes" | t(x)) > p("no" | t(x))."""
        spec = self._discriminator
        task, tokenizer = spec.task, load_tokenizer(spec.model, spec.revision)
        rows = [{"question": as_question(text, self._name), "choices": CHOICES, "answer": 0} for text in texts]
        scored = list(itertools.chain.from_iterable(task.scored(rows, tokenizer, spec.seq_len, {})))
        examples = Examples(
            task=task, splits={"validation": scored}, model_options={}, padding=int(tokenizer.pad_token_id)
        )
        found = scores_of(model, replace(spec, micro_batch_size=None, batch_size=BATCH), examples, "validation")
        nats = [choice.log_likelihood for _, _, choices in found for choice in choices]
        return [yes > no for yes, no in zip(nats[::2], nats[1::2], strict=True)]

    def _drawn(self, of: str, number: int) -> Iterator[str | None]:
        """Texts that a base makes, one after another without end; None where one has no end."""
        spec = self.spec if of == "source" else replace(self.spec, model=self.transfer.to, revision=None)
        if self.how.generator_steps:
            rows = [{"prompt": asks([]), "response": text} for text in stems(self._examples)]
            self._write("examples", rows, rows)
            own = replace(spec, task=Completion(data=self._data("examples")), steps=self.how.generator_steps)
            run_id = self._train(own, f"a generator of prompts ({of})").run_id
            model, text = self._model(own, open_subject(self.store, run_id)), asks([])
        else:
            model, text = self._model(spec, None), asks(self._examples)
        limit = max_length(model)
        tokens = len(load_tokenizer(spec.model, spec.revision)(text)["input_ids"])
        if limit is not None and tokens + self._longest > limit:
            raise InputError(
                f"distil.examples = {self.how.examples}: are {tokens} tokens, and with a prompt's {self._longest} more "
                f"than the {limit} that {spec.model} takes"
            )
        generate = Generate(max_new_tokens=self._longest, temperature=1.0, batch_size=BATCH, metrics=("exact_match",))
        for batch in itertools.count():
            own_seed = replace(generate, seed=method_seed(self.spec, draw=number, batch=batch))
            yield from drawn_texts(model, spec, own_seed, text, self._examples)

    def _answers(self, prompts: list[str]) -> list[str]:
        """What the old adapter on its base answers, greedily."""
        model = self._model(self.spec, self.transfer.subject)
        tokenizer = load_tokenizer(self.spec.model, self.spec.revision)
        task = Completion(data=self.task.data)
        rows = [{"prompt": prompt, "response": ""} for prompt in prompts]
        asked = task.prompts(rows, tokenizer, self.spec.seq_len)
        own = self.task.generation
        longest = own.max_new_tokens if own else max(2, self.spec.seq_len // 2)
        how = Generate(max_new_tokens=longest, batch_size=BATCH)
        return [answer.output for answer in answers(model, self.spec, how, asked)]

    def _model(self, spec: RunSpec, subject: Subject | None) -> nn.Module:
        """A base in float32, with the ΔW of an adapter added."""
        plain = replace(spec, quantization="none", dtype="float32")
        weights = self.transfer.source if spec.model == self.transfer.source_name else self.transfer.target
        model = seeded_base(plain, prepare_stages(plain)[-1], self.device)
        for update in updates_of(subject, weights) if subject else ():
            add_update(model, update)
        return model.eval()

    def _train(self, spec: RunSpec, what: str) -> RunRecord:
        """The record of a run of the folder, trained now where it is not done."""
        record = self.store.read(spec.id)
        if record is None or record.status != Status.DONE:
            self.note(f"train {what}: {spec.steps} steps")
            status = execute(spec, self.store, Options(device=str(self.device)))
            record = self.store.read(spec.id)
            if status == Status.CANCELLED:  # a signal: it goes on from its checkpoint
                raise KeyboardInterrupt
            if status != Status.DONE or record is None:
                error = (record.error if record else None) or f"see {show_path(self.store.folder(spec.id) / 'log.txt')}"
                raise InputError(f"{BY_DATA}: {what}, {spec.id}, has ended as {status}: {clip(error)}")
        return record

    def _data(self, name: str) -> str:
        return str(self.folder / name)

    def _write(self, name: str, train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
        for split, rows in (("validation", validation), ("train", train)):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_bytes(self.folder / name / f"{split}.jsonl", lines.encode())


def _check_factors(subject: Subject, updates: Iterable[Update]) -> None:
    dense = next((update for update in updates if update.A is None), None)
    if dense is not None:
        raise InputError(f"--by {BY_DATA}: {subject.name}: {dense.layer}: ΔW is no product of two factors")
