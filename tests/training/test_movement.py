"""How far factors move, held against the files of a run that never moved, and against factors that forgot."""

from __future__ import annotations

import pytest
import torch

from lorabench.analyses.movement import Movement
from lorabench.linalg.decompose import thin_svd
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute
from lorabench.training.movement import _movement
from lorabench.updates.formats import read_updates
from lorabench.updates.layer import LayerSVD
from tests.conftest import make_spec

QUIET = Options(log_to_file=False, device="cpu")
TASK = {"name": "text", "data": "builtin:python-code", "max_train": 16, "max_eval": 2}


def ended(store, lr, **method):
    spec = make_spec(method={"name": "lora", "rank": 2, "targets": "attention"} | method, task=TASK, steps=2, lr=lr)
    assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    assert not (store.folder(spec.id) / "checkpoint").exists()
    updates = read_updates(store.folder(spec.id) / "updates")
    return store.read(spec.id), {each.layer: (each.A.double(), each.B.double()) for each in updates}


@pytest.mark.parametrize("init", ["kaiming", "eva"])
def test_a_run_records_how_far_it_is_from_one_that_stays_where_it_begins(tmp_path, init):
    """Of one seed two runs begin alike; the learning rate of the other is too small for a float32 to change."""
    about = {"init": init, "alpha": 2.0} | ({"init_examples": 2} if init == "eva" else {})
    (record, ends), (still, starts) = (ended(Store(tmp_path), lr, **about) for lr in (3e-2, 1e-30))
    assert ends.keys() == record.movement.keys()
    for layer, (A, B) in ends.items():
        A0, found = starts[layer][0], record.movement[layer]
        assert found["moved_A"] == pytest.approx(float((A - A0).norm()), rel=1e-9) and found["moved_A"] > 0
        assert found["relative_A"] == pytest.approx(float((A - A0).norm() / A0.norm()), rel=1e-9)
        assert found["cosine_A"] == pytest.approx(float((A * A0).sum() / A.norm() / A0.norm()), rel=1e-9)
        assert found["moved_B"] == pytest.approx(float(B.norm()), rel=1e-6) and "relative_B" not in found
        assert found["cosine_A"] < still.movement[layer]["cosine_A"] == pytest.approx(1)
        assert still.movement[layer]["moved_A"] == 0


def test_of_pissa_both_factors_begin_somewhere(tmp_path):
    """Its file has ΔW as B A − B₀ A₀: the end in the first r rows, the start in the others."""
    record, ends = ended(Store(tmp_path), 3e-2, init="pissa", alpha=2.0)
    for layer, (A, B) in ends.items():
        (A, A0), (B, B0) = A.split(2), B.split(2, dim=1)
        found = record.movement[layer]
        assert found["relative_A"] == pytest.approx(float((A - A0).norm() / A0.norm()), rel=1e-5)
        assert found["relative_B"] == pytest.approx(float((B + B0).norm() / B0.norm()), rel=1e-5)  # it has −B₀
        assert found["cosine_B"] == pytest.approx(float(-(B * B0).sum() / B.norm() / B0.norm()), rel=1e-5)


def test_a_factor_that_has_forgotten_its_start_is_where_the_null_says():
    draw = torch.Generator().manual_seed(0)
    pairs = [
        (3 * torch.randn(4, 30, generator=draw), torch.randn(4, 30, generator=draw).to(torch.bfloat16))
        for _ in range(400)
    ]
    found = [_movement(*pair) for pair in pairs]
    mean = {key: sum(each[key] for each in found) / len(found) for key in found[0]}
    assert mean["relative_*"] == pytest.approx(mean["relative_*_null"], rel=0.01)
    std = torch.tensor([each["relative_*"] - each["relative_*_null"] for each in found]).std()  # at their own lengths
    layer = LayerSVD(
        parameter="w", svd=thin_svd(torch.eye(2)), movement={key.replace("*", "A"): mean[key] for key in mean}
    )
    rows = {row["metric"]: row for row in Movement().compute(layer)}
    assert rows["relative_A"]["null_std"] == pytest.approx(float(std), rel=0.1) and rows["moved_A"]["null"] is None
    spread = (sum(each["cosine_*"] ** 2 for each in found) / len(found)) ** 0.5
    assert spread == pytest.approx(mean["cosine_*_null_std"], rel=0.1) and abs(mean["cosine_*"]) < 4 * spread / 20
    assert _movement(torch.zeros(2, 3), torch.ones(2, 3)) == {
        "moved_*": 6**0.5, "relative_*": 1.0, "relative_*_null": 1.0
    }  # fmt: skip
