"""Which runs are computed together, how many at a time, and what becomes of them where their process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lorabench.config.decode import InputError
from lorabench.launch import pack_size
from lorabench.launch.packs import Asked, Ride, in_packs, key_of, most_in_pack, packs_text
from lorabench.launch.plan import make_plan, plan_text, rides
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep, read_sweep
from lorabench.store.record import Status
from lorabench.store.store import Store
from tests.conftest import make_spec

LORA = {"name": "lora", "rank": 2}
ALIKE = {
    "method": make_spec(method=LORA | {"rank": 5, "dropout": 0.1, "targets": "attention", "init": "pissa"}),
    "lr": make_spec(lr=1e-4),
    "schedule": make_spec(schedule="cosine", warmup=0.2),
    "optimizer": make_spec(weight_decay=0.1, beta1=0.8, beta2=0.9, epsilon=1e-6, clip="none"),
    "seed": make_spec(seed=7),
    "kept": make_spec(keep="svd:2", snapshot_every=2, serving=True),
}
APART = {
    "steps": make_spec(steps=7),
    "batch": make_spec(batch_size=4),
    "passes": make_spec(micro_batch_size=1),
    "length": make_spec(seq_len=16),
    "dtype": make_spec(dtype="bfloat16"),
    "base": make_spec(quantization="nf4"),
    "threads": make_spec(threads=2),
    "evaluations": make_spec(eval_every=3),
    "data": make_spec(task={"name": "text", "max_train": 15, "max_eval": 4}),
    "factors' dtype": make_spec(method=LORA | {"adapter_dtype": "bfloat16"}),
}
ALONE = {
    "full": make_spec(method={"name": "full"}),
    "dora": make_spec(method=LORA | {"dora": True}),
    "embeddings": make_spec(method=LORA | {"embeddings": True}),
    "recomputed dropout": make_spec(method=LORA | {"dropout": 0.1}, gradient_checkpointing=True),
    "encoder-decoder": make_spec(task={"name": "seq2seq", "data": "builtin:arithmetic"}),
}


def test_runs_share_their_passes_where_they_differ_in_what_is_their_own() -> None:
    key = key_of(make_spec())
    assert key is not None
    assert {name for name, spec in ALIKE.items() if key_of(spec) != key} == set()
    apart = [key, *map(key_of, APART.values())]
    assert None not in apart and len({*apart}) == len(apart)
    assert {name for name, spec in ALONE.items() if key_of(spec) is not None} == set()


def runs_of(*weights: int) -> tuple[list[RunSpec], dict[str, Ride]]:
    specs = [make_spec(seed=seed) for seed in range(len(weights))]
    known = {spec.id: Ride(key="k", size=4, weight=weight) for spec, weight in zip(specs, weights, strict=True)}
    return specs, known


def test_packs_are_few_and_alike_for_all_workers_with_runs_of_all_sizes() -> None:
    specs, known = runs_of(1, 9, 1, 9, 1, 9, 1, 9, 1, 9)
    packs = in_packs(specs, known, workers=2)
    assert [len(pack) for pack in packs] == [3, 3, 2, 2] and packs_text(packs) == "10 runs in 4 packs of 2 to 3"
    weights = [[known[run_id].weight for run_id in pack] for pack in packs]
    assert weights == [[9, 9, 1], [9, 1, 1], [9, 1], [9, 1]]
    assert sorted(run_id for pack in packs for run_id in pack) == sorted(known)
    assert [len(pack) for pack in in_packs(specs, known, workers=1)] == [4, 3, 3]
    assert [len(pack) for pack in in_packs(specs[:4], known, workers=2)] == [2, 2]
    assert in_packs(specs[:2], known, workers=2) == [] and packs_text([]) == ""
    assert in_packs(specs, {}, workers=1) == []


@pytest.mark.parametrize(("text", "size"), [("auto", None), ("off", 1), (3, 3)])
def test_what_is_asked_for_is_auto_off_or_a_number(text: str | int, size: int | None) -> None:
    assert most_in_pack(text) == size


@pytest.mark.parametrize("text", ["no", 0, -1, None])
def test_anything_else_is_refused_with_the_choices(text: object) -> None:
    with pytest.raises(InputError, match=r"pack = .*: must be auto, off or a number of at least 1"):
        most_in_pack(text)  # type: ignore[arg-type]


def test_as_many_are_packed_as_pay_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [make_spec(seed=seed, seq_len=32) for seed in range(3)]
    large = [make_spec(seed=seed, seq_len=512, batch_size=32) for seed in range(3)]
    found, _ = rides([*small, *large], Asked(device="cpu"))
    assert {found[spec.id].size for spec in small} <= {4, 8, 16, 32} and not {spec.id for spec in large} & set(found)
    asked, _ = rides(small, Asked(device="cpu", size=2))
    assert {asked[spec.id].size for spec in small} == {2} and rides(small, Asked(size=1))[0] == {}
    found, why = rides([*small, *large, *ALONE.values(), make_spec(seq_len=16)], Asked(device="cpu"))
    assert set(found) == {spec.id for spec in small}
    assert sum(int(note.split()[2]) for note in why) == len(large) + len(ALONE) + 1 and len(why) >= 6
    assert "not packed: 1 run: no other has their base, data, batches and steps" in why
    assert any(note == 'not packed: 1 run: task.name = "seq2seq" has a decoder' for note in why)
    monkeypatch.setattr(pack_size, "free_memory", lambda: 1e6)
    assert rides(small, Asked(device="cpu"))[0] == {}


def test_a_base_that_drops_out_by_itself_is_not_packed_and_the_plan_says_so(
    tiny_bases: dict[str, str], tmp_path: Path
) -> None:
    model = torch.nn.Identity()
    model.config = type("Config", (), {"to_dict": lambda self: {"attention_dropout": 0.1, "resid_pdrop": 0.0}})()
    assert pack_size.unfit_base(make_spec(), model) == "Identity drops out by itself (attention_dropout = 0.1)"
    specs = tuple(make_spec(model=tiny_bases["gpt2"], seed=seed) for seed in range(2))  # by its default configuration
    sweep = Sweep(name="s", text="", runs=(*specs, *(make_spec(seed=seed) for seed in range(4))))
    text = plan_text(sweep, make_plan(sweep, Store(tmp_path), "cpu", packing=Asked(device="cpu", workers=2)))
    assert "packed: 4 runs in 2 packs of 2" in text and "not packed: GPT2LMHeadModel drops out by itself" in text


class TinyForImageClassification(torch.nn.Module):
    """As much of transformers' classifiers as is looked at."""

    base_model_prefix, main_input_name = "vit", "pixel_values"

    def __init__(self, head: torch.nn.Module, **config: object) -> None:
        super().__init__()
        self.vit, self.classifier, self.drawn = torch.nn.Linear(2, 2), head, {"classifier.weight": None}
        self.config = type("Config", (), config | {"to_dict": lambda self: config})()


def test_a_linear_head_is_packed_whoever_has_drawn_it_and_no_other_nor_images_cut_into_windows() -> None:
    linear, deep = torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(2, 3))
    why = [pack_size.unfit_base(make_spec(), model) for model in (
        TinyForImageClassification(linear), TinyForImageClassification(deep),
        TinyForImageClassification(linear, window_size=7), TinyForImageClassification(linear, drop_path_rate=0.1),
    )]  # fmt: skip
    assert why == [
        "",
        "its head classifier is a Sequential, and no linear layer",
        "TinyForImageClassification computes parts of an image apart from its row",
        "TinyForImageClassification drops out by itself (drop_path_rate = 0.1)",
    ]
    lacking = TinyForImageClassification(linear)
    lacking.drawn["vit.weight"] = None
    assert pack_size.unfit_base(make_spec(), lacking) == "its files lack weights, which each run draws"


SWEEP = """
[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
task.max_train = 64
task.max_eval = 8
seq_len = 64
batch_size = 2
steps = 80
serving = false
method.name = "lora"
method.dropout = 0.1

[[grid]]
method.rank = [2, 4]
seed = [0, 1]
"""


def start(sweep: Path, results: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "lorabench", "run", str(sweep), "--results", str(results), "--pack", "4"]
    return subprocess.Popen([*command, "--workers", "1", "--device", "cpu", "--checkpoint-seconds", "0.3"],
                            stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip


def checkpoint_step(store: Store, spec: RunSpec) -> int | None:
    file = store.folder(spec.id) / "checkpoint" / "state.pt"
    return torch.load(file)["step"] if file.exists() else None


def test_a_killed_pack_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(SWEEP)
    specs = read_sweep(sweep).runs
    whole, battered = Store(tmp_path / "whole"), Store(tmp_path / "battered")
    assert start(sweep, whole.root).wait(300) == 0
    process, pids = start(sweep, battered.root), set()
    while process.poll() is None and not pids:
        claims = [state.claim for state in battered.states(list(specs)) if state.claim]
        if len(claims) == 4 and min(claim.progress.get("step", 0) for claim in claims) >= 20:
            (pid,) = {claim.pid for claim in claims}
            os.kill(pid, signal.SIGSTOP)  # not while it writes one checkpoint after another
            steps = {checkpoint_step(battered, spec) for spec in specs}
            between = len(steps) == 1 and None not in steps
            os.kill(pid, signal.SIGKILL if between else signal.SIGCONT)
            pids = {pid} if between else set()
        time.sleep(0.02)
    assert process.wait(60) == 1 and len(pids) == 1
    assert {state.status for state in battered.states(list(specs))} == {Status.CANCELLED}
    assert start(sweep, battered.root).wait(300) == 0
    for spec in specs:
        got, want = battered.read(spec.id), whole.read(spec.id)
        assert got.environment["packed"] == want.environment["packed"] == 4
        assert got.attempts > 1 and got.resumed_from_step and got.files == want.files
        assert got.steps_sha256 == want.steps_sha256
