"""Runs in a pack against each of them alone: the same numbers, statuses and files, whatever becomes of the others."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from lorabench.spec.measures import MEASURES
from lorabench.spec.run_spec import RunSpec
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.base import SharedBase
from lorabench.training.execute import Options, execute, execute_pack
from lorabench.training.meter import Meter
from lorabench.training.packed import pack as module
from lorabench.training.packed.layer import Unpackable
from lorabench.training.state import Training
from lorabench.updates.formats import read_updates
from tests.conftest import make_spec

QUIET = Options(log_to_file=False, device="cpu")


def lora(rank: int = 2, **method: object) -> dict:
    return {"name": "lora", "rank": rank} | method


VARIANTS = {
    "plain": make_spec(method=lora(), lr=3e-3),
    "rank": make_spec(method=lora(5, targets="query-value"), seed=1, schedule="constant", lr=3e-3),
    "dropout": make_spec(method=lora(3, dropout=0.2), seed=2, weight_decay=0.1, snapshot_every=4, lr=3e-3),
    "lora+": make_spec(method=lora(lr_ratio=8.0), schedule="cosine", clip=0.1, warmup=0.3, lr=1e-3),
    "pissa": make_spec(method=lora(init="pissa", dropout=0.1), weight_decay=0.1, lr=3e-3),
    "rslora": make_spec(method=lora(4, init="orthogonal", rslora=True, layers="1-2", alpha=4.0), clip="none", lr=3e-3),
    "patterns": make_spec(method=lora(rank_pattern={"q_proj": 6}, targets="attention"), beta2=0.99),
}
"""All of LoRA that can be packed, at once."""


def loss_rows(store: Store, spec: RunSpec) -> list[dict]:
    return [json.loads(line) for line in (store.folder(spec.id) / "steps.jsonl").read_text().splitlines()]


def distance(one: Path, other: Path) -> float:
    """‖ΔW - ΔW'‖ / ‖ΔW'‖ over all layers of two runs."""
    first, second = ({u.parameter: u.dense().double() for u in read_updates(folder)} for folder in (one, other))
    assert first.keys() == second.keys()
    apart = sum(float((first[name] - second[name]).square().sum()) for name in first)
    return math.sqrt(apart / sum(float(value.square().sum()) for value in second.values()))


def assert_alike(spec: RunSpec, store: Store, alone: Store, *, loss: float = 1e-5, update: float = 3e-5) -> None:
    got, want = store.read(spec.id), alone.read(spec.id)
    assert (got.status, got.error) == (want.status, want.error) == (Status.DONE, None)
    rows, expected = loss_rows(store, spec), loss_rows(alone, spec)
    assert [row.keys() for row in rows] == [row.keys() for row in expected] and rows
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=loss)
    assert got.files.keys() == want.files.keys()
    for folder in {Path(name).parent for name in got.files}:
        assert distance(store.folder(spec.id) / folder, alone.folder(spec.id) / folder) < update
    for name in ("valid_loss", "test_loss", "base_valid_loss", "train_loss"):
        assert got.measures[name] == pytest.approx(want.measures[name], rel=loss)


def together(root: Path, specs: list[RunSpec]) -> tuple[Store, list[Status]]:
    store = Store(root)
    return store, execute_pack(specs, store, QUIET)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Each of the variants by itself."""
    store = Store(tmp_path_factory.mktemp("alone"))
    for spec in VARIANTS.values():
        assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    return store


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """All of them in one pack."""
    store, statuses = together(tmp_path_factory.mktemp("packed"), [*VARIANTS.values()])
    assert set(statuses) == {Status.DONE}
    return store


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_in_a_pack_what_it_learns_alone(name: str, packed: Store, alone: Store) -> None:
    assert_alike(VARIANTS[name], packed, alone)


def test_a_packed_record_tells_its_own_share_and_says_so(packed: Store, alone: Store) -> None:
    record, other = (store.read(VARIANTS["plain"].id) for store in (packed, alone))
    assert record.environment["packed"] == len(VARIANTS) and "packed" not in other.environment
    assert set(record.measures) <= set(MEASURES) and record.provenance["peak_gib"].startswith("its share of a pack's")
    assert {"peak_gib", "tokens_per_second", "optimizer_state_gib", "flops_per_step"} <= set(record.measures)
    assert record.measures["flops_per_step"] == other.measures["flops_per_step"]
    assert record.measures["optimizer_state_gib"] == other.measures["optimizer_state_gib"]
    assert min(record.measures[f"{phase}_peak_gib"] for phase in ("load", "forward_backward", "optimizer")) > 0


OTHERS = {
    "nf4": ({"quantization": "nf4"}, 1e-5, 3e-5),
    "int8": ({"quantization": "int8"}, 1e-3, 0.05),  # which columns are outliers depends on all rows of a pass
    "bfloat16": ({"dtype": "bfloat16"}, 1e-2, 0.2),  # a product's sum is rounded at other places
    "accumulated": ({"micro_batch_size": 1, "gradient_checkpointing": True, "eval_every": 3}, 1e-5, 3e-5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_pack_on_other_bases_learns_what_its_runs_learn_alone(name: str, tmp_path: Path) -> None:
    changes, loss, update = OTHERS[name]
    second = lora(init="loftq" if "quantization" in changes else "gaussian")
    specs = [make_spec(lr=3e-3, **changes), make_spec(lr=3e-3, seed=1, method=second, **changes)]
    by_itself, (store, _) = Store(tmp_path / "alone"), together(tmp_path / "packed", specs)
    for spec in specs:
        execute(spec, by_itself, QUIET)
        assert_alike(spec, store, by_itself, loss=loss, update=update)


DIGITS = {"name": "image_classification", "data": "builtin:digits-turned", "shift": 0.1, "max_train": 32, "max_eval": 8}
IMAGES = {"model": "builtin:tiny-vit", "task": DIGITS | {"retain": "builtin:digits"}, "batch_size": 4}


@pytest.mark.parametrize("data", ["images", "texts"])
def test_runs_with_a_head_learn_in_a_pack_what_they_learn_alone(
    data: str, labelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of images the head of the files; of texts, some padded, a new one, which each seed draws for itself. Stopped on
    the way, they go on to the same bits."""
    task = {"name": "classification", "data": labelled, "max_train": 32, "max_eval": 8}
    own = IMAGES if data == "images" else {"task": task, "micro_batch_size": 1, "epsilon": 1e-6}
    specs = [
        make_spec(lr=3e-3, seed=1, method=lora(2, dropout=0.2), snapshot_every=4, **own),
        make_spec(lr=3e-3, method=lora(8, targets="query-value", lr_ratio=4.0), clip=0.1, weight_decay=0.1, **own),
        make_spec(lr=1e-3, method=lora(3), schedule="constant", **own),
    ]
    by_itself, (store, _) = Store(tmp_path / "alone"), together(tmp_path / "packed", specs)
    assert "not in one pass" not in capsys.readouterr().out
    heads = set()
    for spec in specs:
        execute(spec, by_itself, QUIET)
        assert_alike(spec, store, by_itself)
        got, want = (each.read(spec.id).measures for each in (store, by_itself))
        assert got["valid_accuracy"] == want["valid_accuracy"] and store.read(spec.id).environment["packed"] == 3
        assert {key: got[key] for key in got if "retain" in key} == pytest.approx(
            {key: want[key] for key in want if "retain" in key}, rel=1e-4
        )
        heads |= {u.parameter for u in read_updates(store.folder(spec.id) / "updates") if u.A is None}
    assert heads == ({"classifier.weight", "classifier.bias"} if data == "images" else {"score.weight"})
    with monkeypatch.context() as patch:
        stop_after(patch, 3, slice(None))
        stopped, statuses = together(tmp_path / "stopped", specs)
    assert set(statuses) == {Status.CANCELLED} and set(execute_pack(specs, stopped, QUIET)) == {Status.DONE}
    for spec in specs:
        assert stopped.read(spec.id).files == store.read(spec.id).files
        assert loss_rows(stopped, spec) == loss_rows(store, spec)


def test_batches_of_other_lengths_are_padded_and_each_run_keeps_its_own_loss(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b " * (1 + 5 * (number % 4))} for number in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "completion", "data": str(tmp_path)}
    own = {"task": task, "lr": 3e-3, "epsilon": 1e-6}  # else AdamW makes a step of a gradient that is all rounding
    specs = [make_spec(**own, seed=seed, method=lora(dropout=0.1 * seed)) for seed in range(3)]
    by_itself, (store, _) = Store(tmp_path / "alone"), together(tmp_path / "packed", specs)
    for spec in specs:
        execute(spec, by_itself, QUIET)
        assert_alike(spec, store, by_itself)


def test_what_differs_from_a_run_alone_is_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 gradients agree a million times better: nothing is left out, and nothing is of another run."""
    specs = [VARIANTS["plain"], VARIANTS["rank"], VARIANTS["lora+"]]
    base = SharedBase.open(specs[0], torch.device("cpu"), Meter(torch.device("cpu"), 1))
    base.whole.double()
    monkeypatch.setattr(type(base.whole.model.norm), "forward", exact_norm)
    found = {}
    for dtype in (torch.float64, torch.float32):
        base.whole.to(dtype)
        trainings = [Training.attach(spec, base.of(spec), Meter(base.device, 1)) for spec in specs]
        for training in trainings:
            training.model.to(dtype)
            for index, parameter in enumerate(p for p in training.model.parameters() if p.requires_grad):
                generator = torch.Generator().manual_seed(index)
                parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) * 0.02
        found[dtype] = max(gradient_errors(trainings))
    assert found[torch.float64] < 1e-11 and found[torch.float32] < 1e-4


def exact_norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the precision of its input; transformers' is in float32."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def gradient_errors(trainings: list[Training]) -> list[float]:
    """Of each run's gradient of the sum of its logits, alone and in a pack."""
    rows, model = module.Rows(trainings), module.PackedModel(trainings[0])
    model.put(rows.layers, rows.heads)
    batches = []
    for row in range(len(trainings)):
        rows.push(row)
        batches.append(torch.randint(1000, (2, 8), generator=torch.Generator().manual_seed(row)))
    model.lanes.num_rows, model.lanes.lengths = 2 * len(trainings), [8] * len(trainings)
    model.model(input_ids=torch.cat(batches)).logits.square().mean().backward()
    errors = []
    for row, (training, batch) in enumerate(zip(trainings, batches, strict=True)):
        (training.model(input_ids=batch).logits.square().mean() / len(trainings)).backward()
        group, own = next((each, row - each.runs.start) for each in rows.groups if row < each.runs.stop)
        for parameter, place in group._views(group.grads, own):
            errors.append(float((parameter.grad - place).norm() / parameter.grad.norm()))
    return errors


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, which: slice) -> None:
    """Have some of a pack's runs stopped after so many of its steps, as a signal or `lorabench cancel` would."""
    real, seen = module.Pack._look_at_the_clock, iter(range(1, 100))

    def look(self: module.Pack) -> None:
        real(self)
        if next(seen) == steps:
            for stop in self.stops[which]:
                stop.reason = "SIGTERM"

    monkeypatch.setattr(module.Pack, "_look_at_the_clock", look)


def test_a_pack_that_is_stopped_goes_on_to_the_same_bits(
    packed: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [*VARIANTS.values()]
    with monkeypatch.context() as patch:
        stop_after(patch, 3, slice(None))
        store, statuses = together(tmp_path, specs)
    assert set(statuses) == {Status.CANCELLED}
    steps = {torch.load(store.folder(spec.id) / "checkpoint" / "state.pt")["step"] for spec in specs}
    assert steps == {3}
    assert set(execute_pack(specs, store, QUIET)) == {Status.DONE}
    for spec in specs:
        assert store.read(spec.id).files == packed.read(spec.id).files
        assert loss_rows(store, spec) == loss_rows(packed, spec)


def test_a_run_that_leaves_a_pack_goes_on_alone_and_the_others_without_it(
    alone: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["dropout", "plain", "pissa"]
    specs = [VARIANTS[name] for name in names]
    with monkeypatch.context() as patch:
        stop_after(patch, 3, slice(0, 1))
        store, statuses = together(tmp_path, specs)
    assert statuses == [Status.CANCELLED, Status.DONE, Status.DONE]
    assert execute(specs[0], store, QUIET) == Status.DONE and store.read(specs[0].id).resumed_from_step
    for spec in specs:
        assert_alike(spec, store, alone)


def test_one_that_diverges_or_fails_leaves_the_others_alone(
    alone: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = make_spec(lr=1e25, clip="none", schedule="constant")
    wrong = make_spec(method=lora(targets="no_such_layer"))
    specs = [VARIANTS["plain"], wild, wrong, VARIANTS["lora+"]]
    store, statuses = together(tmp_path, specs)
    assert statuses == [Status.DONE, Status.DIVERGED, Status.FAILED, Status.DONE]
    assert "fits no linear layer" in store.read(wrong.id).error
    for name in ("plain", "lora+"):
        assert_alike(VARIANTS[name], store, alone)


def test_runs_that_cannot_share_a_pass_after_all_are_computed_one_after_another(
    alone: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bits of a run alone, dropout too: nothing has been drawn in vain."""

    def refuse(*_: object) -> None:
        raise Unpackable("no")

    real, passes = module.PackedModel._together, iter(range(100))
    monkeypatch.setattr(module.PackedModel, "_together", lambda *a: refuse() if next(passes) == 0 else real(*a))
    specs = [VARIANTS[name] for name in ("dropout", "rank")]
    store, statuses = together(tmp_path, specs)
    assert statuses == [Status.DONE, Status.DONE]
    for spec in specs:
        assert store.read(spec.id).files == alone.read(spec.id).files
        assert store.read(spec.id).measures["peak_gib"] > 0


def test_what_another_worker_has_and_what_is_done_is_left_to_it(alone: Store, tmp_path: Path) -> None:
    specs = [VARIANTS["plain"], VARIANTS["rank"], dataclasses.replace(VARIANTS["plain"], seed=9)]
    store = Store(tmp_path)
    execute(specs[0], store, QUIET)
    before = store.read(specs[0].id)
    hold = store.claim(specs[1])
    with hold:
        assert execute_pack(specs, store, QUIET) == [Status.DONE, Status.RUNNING, Status.DONE]
    assert store.read(specs[0].id) == before and store.read(specs[1].id) is None
    assert "packed" not in store.read(specs[2].id).environment  # it was alone after all
