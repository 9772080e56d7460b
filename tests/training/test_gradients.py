"""The gradient at W0 without a weight that trains: against autograd's of every weight; and its file."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lorabench.linalg.decompose import thin_svd
from lorabench.models import base_model
from lorabench.training.base import Base
from lorabench.training.examples import collate
from lorabench.training.gradients import RANK, keep, top, triplets
from lorabench.training.meter import Meter
from lorabench.training.predictions import task_loss
from lorabench.training.state import Training
from lorabench.updates.gradients import FOLDER, read_gradients
from tests.conftest import make_spec

CPU = torch.device("cpu")
TASK = {"name": "text", "data": "builtin:python-code", "retain": "builtin:english-docs", "max_train": 8, "max_eval": 2}


@pytest.fixture(scope="module")
def training() -> Training:
    spec = make_spec(task=TASK, snapshot_every=1)
    return Training.attach(spec, Base.read(spec, CPU), Meter(CPU, 10))


def base_of(training: Training) -> torch.nn.Module:
    return base_model.load_base(training.spec, CPU, {})


@pytest.mark.parametrize("split", ["train", "retain"])
def test_triplets_are_those_of_autograds_gradient_of_the_mean_loss(training: Training, split: str) -> None:
    examples, model = training.base.stages[-1], base_of(training).double().eval()
    batch = collate(examples.splits[split], examples.padding, CPU)
    (task_loss(model, examples.task, batch) / examples.task.count(batch)).backward()
    found = triplets(training, base_of(training), examples, split)
    wanted = {name.removesuffix(".weight"): p.grad for name, p in model.named_parameters() if "proj" in name}
    assert found.keys() == wanted.keys() and len(found) == 28
    for layer, svd in found.items():
        U, S, Vh = torch.linalg.svd(wanted[layer], full_matrices=False)
        torch.testing.assert_close(svd.S, S[:RANK], rtol=1e-3, atol=1e-6)
        first = (svd.U[:, 0].double() @ U[:, 0]) * (svd.Vh[0].double() @ Vh[0])
        assert float(first) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("tokens", [5, 60])
def test_the_factors_give_what_the_matrix_gives(tokens: int) -> None:
    g, h = (torch.randn(tokens, size, generator=torch.Generator().manual_seed(size)) for size in (20, 30))
    found, wanted = top([(g[:2], h[:2]), (g[2:], h[2:])], 7), thin_svd(g.mT.double() @ h.double() / 7)
    k = min(RANK, tokens)
    torch.testing.assert_close(found.S, wanted.S[:k], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((found.U * found.S[:k]).double() @ found.Vh.double(),
                               (wanted.U[:, :k] * wanted.S[:k]) @ wanted.Vh[:k], rtol=1e-4, atol=1e-4)  # fmt: skip


def test_one_file_serves_all_runs_of_a_base_and_its_data(training: Training, tmp_path) -> None:
    name = keep(training, base_of(training), tmp_path)
    file = tmp_path / FOLDER / name
    other = dataclasses.replace(training, spec=dataclasses.replace(training.spec, lr=1.0, seed=5, batch_size=1))
    before = file.stat().st_mtime_ns
    assert keep(other, base_of(training), tmp_path) == name and file.stat().st_mtime_ns == before
    longer = dataclasses.replace(training, spec=dataclasses.replace(training.spec, seq_len=16))
    assert keep(longer, base_of(training), tmp_path) != name
    layer = "model.layers.1.mlp.up_proj"
    read, made = read_gradients(file, layer), triplets(training, base_of(training), training.base.stages[-1], "train")
    assert set(read) == {"task", "retain"}
    torch.testing.assert_close(read["task"].S, made[layer].S)
    assert not read_gradients(file, "model.layers.9.mlp.up_proj") and not read_gradients(tmp_path / FOLDER, layer)
