"""Drift and KL against their definitions in float64, extremes, chance, and hand-made passes over a run's own files."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from lorabench.spec.measures import MEASURES
from lorabench.spec.task import IGNORE
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training import predictions
from lorabench.training.drift import TOKENS, Seen, drift, null_std, squared_norm, watched
from lorabench.training.examples import collate, prepare
from lorabench.training.execute import Options, execute
from lorabench.training.predictions import divergences
from lorabench.updates.formats import read_updates
from lorabench.updates.update import Update
from tests.conftest import make_spec

QUIET = Options(log_to_file=False, device="cpu")
TASK = {"name": "text", "data": "builtin:python-code", "retain": "builtin:english-docs", "max_train": 16, "max_eval": 4}
M, N, T = 12, 9, 40


def made(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(W: torch.Tensor, H: torch.Tensor) -> dict[str, Seen]:
    """As two passes over the tokens H (t, N) leave it."""
    layer = torch.nn.Linear(N, M, dtype=torch.float64)
    layer.weight.data, model = W.clone(), torch.nn.Sequential(layer)
    with torch.no_grad(), watched(model, lambda _: True) as found:
        model(H[: T // 4][None])
        model(H[T // 4 :])
    return found


def of(B: torch.Tensor, A: torch.Tensor | None = None) -> Update:
    return Update(parameter="0.weight", B=B, A=A)


@pytest.mark.parametrize("is_low_rank", [True, False])
def test_drift_is_the_ratio_of_mean_squares_and_its_null_that_of_random_changes(is_low_rank: bool) -> None:
    W, H, B, A = made(0, M, N), made(1, T, N) * torch.arange(1, N + 1), made(2, M, 3), made(3, 3, N)
    dense = B @ A
    update = of(B, A) if is_low_rank else of(dense)
    wanted = sum((dense @ h).square().sum() for h in H) / sum((W @ h).square().sum() for h in H)
    found, null = drift(update, seen(W, H))
    assert found == pytest.approx(float(wanted), rel=1e-5)
    assert squared_norm(update) == pytest.approx(float(dense.norm() ** 2), rel=1e-12)
    random = [made(seed, M, N) for seed in range(10, 400)]
    scaled = [other * dense.norm() / other.norm() for other in random]
    mean = sum(drift(of(other), seen(W, H))[0] for other in scaled) / len(scaled)
    assert null == pytest.approx(mean, rel=0.05)
    # the same singular values in random directions, over two sets of inputs, the second of other energy
    S, sets = torch.linalg.svdvals(dense)[:3], [seen(W, H), seen(W, made(4, T, N))]
    draws = []
    for seed in range(400):
        U, V = (torch.linalg.qr(made(seed + place, d, 3)).Q for place, d in ((1000, M), (2000, N)))
        draws.append(sum(drift(of(U * S, V.mT), each)[0] for each in sets) / 2)
    std = null_std(update, [each["0"] for each in sets])
    assert std == pytest.approx(float(torch.tensor(draws).std()), rel=0.1)


def test_a_multiple_of_the_base_drifts_by_its_square_and_a_change_off_the_data_by_nothing() -> None:
    W, H = made(0, M, N), made(1, T, N)
    H[:, :4] = 0
    assert drift(of(0.1 * W), seen(W, H))[0] == pytest.approx(0.01, rel=1e-5)
    off = torch.zeros(M, N, dtype=torch.float64)
    off[:, :4] = made(2, M, 4)
    assert drift(of(off), seen(W, H)) == (0.0, pytest.approx(drift(of(off), seen(W, H))[1]))
    assert drift(of(off), {}) is None and drift(Update(parameter="0.bias", B=W[:, :1]), seen(W, H)) is None


@pytest.fixture(scope="module", params=[{}, {"restart_every": 1}], ids=["lora", "relora"])
def run(tmp_path_factory, request):
    """A LoRA run of two steps, also of one that merges into its base between them, its record, and its folder."""
    method = {"name": "lora", "rank": 2} | request.param
    store, spec = Store(tmp_path_factory.mktemp("drift")), make_spec(method=method, task=TASK, steps=2, lr=3e-2)
    assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    return spec, store.read(spec.id), store.folder(spec.id)


def models_of(spec, folder):
    from lorabench.models import base_model, weights

    base, tuned = (base_model.load_base(spec, torch.device("cpu"), {}).eval() for _ in range(2))
    for update in read_updates(folder / "updates"):
        weights.add_update(tuned, update)
    return base, tuned


def test_a_run_records_what_passes_over_its_files_give(run) -> None:
    spec, record, folder = run
    base, tuned = models_of(spec, folder)
    updates = {update.layer: update.dense().double() for update in read_updates(folder / "updates")}
    examples = prepare(spec)
    for name, split in {"task": "validation", "retain": "retain"}.items():
        inputs, kls = defaultdict(list), []
        hooks = [
            base.get_submodule(layer).register_forward_pre_hook(
                lambda _, args, into=inputs[layer]: into.append(args[0][0].double())
            )
            for layer in updates
        ]
        rows = examples.splits[split]
        assert sum(len(row["input_ids"]) for row in rows) <= TOKENS
        with torch.no_grad():
            for row in rows:
                ids = collate([row], 0, torch.device("cpu"))["input_ids"]
                p, q = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in (base, tuned))
                kls += (p.exp() * (p - q)).sum(-1).tolist()
        for hook in hooks:
            hook.remove()
        ratios = []
        for layer, delta in updates.items():
            H, W = torch.cat(inputs[layer]), base.get_submodule(layer).weight.detach().double()
            ratios.append(float((H @ delta.T).square().sum() / (H @ W.T).square().sum()))
            assert record.drift[layer][name] == pytest.approx(ratios[-1], rel=1e-4)
        assert record.measures[f"drift_{name}"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
        assert record.measures[f"kl_{name}"] == pytest.approx(sum(kls) / len(kls), rel=1e-3) and sum(kls) > 0
    assert {name for name in MEASURES if MEASURES[name].group == "drift"} <= record.measures.keys()
    assert 0 < record.measures["drift_seconds"] < record.measures["total_seconds"]


def test_predictions_diverge_alike_in_chunks_and_from_all_logits_and_never_from_themselves(run, monkeypatch) -> None:
    spec, _, folder = run
    base, tuned = models_of(spec, folder)
    batch = collate(prepare(spec).splits["validation"][:2], 0, torch.device("cpu"))
    targets = prepare(spec).task.targets(batch)
    whole = divergences(base, tuned, batch, targets)
    assert len(whole) == int((targets != IGNORE).sum()) and float(whole.min()) >= 0
    assert float(divergences(base, base, batch, targets).max()) == 0
    monkeypatch.setattr(predictions, "CHUNK_BYTES", {"cpu": 4 * 700 * 5})
    torch.testing.assert_close(divergences(base, tuned, batch, targets), whole, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(predictions, "_read", lambda *_: None)
    torch.testing.assert_close(divergences(base, tuned, batch, targets), whole, rtol=1e-4, atol=1e-6)


def test_what_fails_is_told_in_the_record_and_the_run_is_done(tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room\nfor it")

    monkeypatch.setattr("lorabench.training.drift.base_beside", fail)
    store, spec = Store(tmp_path), make_spec(steps=1)
    assert execute(spec, store, QUIET) == Status.DONE
    record = store.read(spec.id)
    assert record.provenance["drift"] == "not measured: MemoryError: no room"
    assert not record.drift and "kl_task" not in record.measures
