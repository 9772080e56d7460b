"""Optimizers against torch's and PEFT's own in a plain loop, against closed forms, and across a checkpoint."""

from __future__ import annotations

import json
import tomllib

import pytest
import torch

from lorabench.config import plugins
from lorabench.config.decode import InputError, encode
from lorabench.launch import packs
from lorabench.methods._peft import tuner_layers
from lorabench.models import base_model as models
from lorabench.report.results import load_results
from lorabench.spec.method import Factor
from lorabench.spec.run_spec import RunSpec, swept_keys
from lorabench.spec.sweep import parse_sweep
from lorabench.store.store import Store
from lorabench.training.examples import collate, prepare
from lorabench.training.optimizers.lora_fa import _correct
from lorabench.training.passes import forward
from lorabench.training.state import make_optimizer
from tests.conftest import BASE, make_spec
from tests.methods.test_methods import CPU, attach
from tests.training.test_execute import whole_and_resumed

LORA, FULL = {"name": "lora", "rank": 2}, {"name": "full"}
NAMES = plugins.names("optimizers")
SEQUENCES = {"name": "classification", "max_train": 16, "max_eval": 4}


@pytest.fixture
def after_steps(tiny_bases):
    """`after_steps(spec, make)`: a model's trained parameters after 3 steps of what `make(model)` gives, and before."""

    def train(spec, make):
        examples = prepare(spec)
        model = attach(spec, examples).train()
        before = [p.detach().clone() for p in model.parameters()]
        optimizers = make(model)
        batch = collate(examples.splits["train"][:2], examples.padding, CPU)
        for _ in range(3):
            model.zero_grad()
            (spec.task.loss(forward(model, batch), batch) / spec.task.count(batch)).backward()
            for optimizer in optimizers:
                optimizer.step()
        return [*model.parameters()], before

    return lambda spec, make: train(RunSpec.from_json(spec.to_json() | {"model": tiny_bases["llama"]}), make)


def ours(spec):
    def make(model):
        spec.optimizer.prepare(model, spec)
        return [make_optimizer(spec, model)]

    return make


def theirs(cls, **options):
    return lambda model: [cls([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)]


def same(got, want, **tolerance):
    (got, before), (want, _) = got, want
    assert any(not torch.equal(a, b) for a, b in zip(got, before, strict=True))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **({"atol": 0, "rtol": 0} | tolerance))


@pytest.mark.parametrize(
    ("optimizer", "cls", "options"),
    [
        ({"name": "sgd"}, torch.optim.SGD, {}),
        ({"name": "sgd", "momentum": 0.9, "nesterov": True}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("muon", torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}),
        ({"name": "muon", "scale": "original", "newton_schulz": 3}, torch.optim.Muon, {"ns_steps": 3}),
        ({"name": "torch", "type": "NAdam", "config": {"betas": [0.8, 0.9]}}, torch.optim.NAdam, {"betas": (0.8, 0.9)}),
    ],
)
def test_it_is_torch_own_after_the_same_steps(optimizer, cls, options, after_steps):
    spec = make_spec(optimizer=optimizer, weight_decay=0.1)
    same(after_steps(spec, ours(spec)), after_steps(spec, theirs(cls, weight_decay=0.1, **options)))


def test_muon_leaves_embeddings_heads_and_vectors_to_adamw(after_steps):
    def both(model):
        inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
        outer = [p for p in model.parameters() if not any(p is other for other in inner)]
        assert len(inner) == 14 and len(outer) == 2 + 2 * 2 + 1 and {p.ndim for p in outer} == {1, 2}
        return [
            torch.optim.Muon(inner, lr=1e-2, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=1e-2, weight_decay=0, fused=True),
        ]

    spec = make_spec(method=FULL, optimizer="muon")
    same(after_steps(spec, ours(spec)), after_steps(spec, both))


def test_lora_fa_is_peft_own_with_its_projection_in_float32(after_steps, monkeypatch):
    from peft.optimizers import create_lorafa_optimizer, lorafa

    def make(model):
        optimizer = create_lorafa_optimizer(model, 2, 3, 1e-2)
        optimizer.param_groups[0]["eps"] = 1e-30  # which it adds before the correction of its moments, torch after
        return [optimizer]

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    spec = make_spec(method=LORA | {"alpha": 3.0}, optimizer="lora_fa", epsilon=1e-30)
    same(after_steps(spec, ours(spec)), after_steps(spec, make), atol=1e-4, rtol=1e-3)


def test_riemannian_is_peft_own(after_steps):
    from peft.optimizers import create_riemannian_optimizer

    spec = make_spec(optimizer={"name": "riemannian", "damping": 0.1})

    def make(model):
        return [create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-2, reg=0.1, weight_decay=0, fused=True)]

    same(after_steps(spec, ours(spec)), after_steps(spec, make), atol=2e-6, rtol=1e-4)


def test_lora_fa_steps_by_the_nearest_to_the_full_gradient():
    """s g A is the projection of G onto the rows of A, whatever the scale and whichever A has these rows."""
    torch.manual_seed(0)
    G, A, mixed = torch.randn(7, 5), torch.randn(2, 5), torch.randn(2, 2)
    for factor, scale in ((A, 1.0), (A, 3.0), (mixed @ A, 0.5)):
        B = torch.nn.Parameter(torch.zeros(7, 2))
        B.grad = scale * G @ factor.T
        _correct([Factor(A=torch.nn.Parameter(factor), B=B, scale=scale)])
        torch.testing.assert_close(scale * B.grad @ factor, G @ torch.linalg.pinv(A) @ A, atol=1e-5, rtol=1e-4)


def test_lora_fa_trains_b_alone(tiny_bases):
    spec = make_spec(optimizer="lora_fa", model=tiny_bases["llama"])
    model = attach(spec, prepare(spec))
    both = sum(p.numel() for p in model.parameters() if p.requires_grad)
    spec.optimizer.prepare(model, spec)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 14 and all(".lora_B." in name for name in trained)
    assert 0 < spec.optimizer.num_kept(model) < 2 * both


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize(
    "optimizer", [*NAMES, {"name": "sgd", "momentum": 0.9}, {"name": "torch", "type": "RMSprop"}], ids=str
)
def test_it_keeps_as_much_as_is_planned(optimizer, method, tiny_bases):
    try:
        spec = make_spec(method=method, optimizer=optimizer, model=tiny_bases["llama"])
    except InputError:
        return  # of factors alone
    model = attach(spec, prepare(spec))
    spec.optimizer.prepare(model, spec)
    planned, made = spec.optimizer.num_kept(model), make_optimizer(spec, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    made.step()
    kept = [t for state in made.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    assert sum(t.numel() for t in kept) == planned


RUNS = {"muon": {"method": FULL, "optimizer": "muon", "lr": 1e-3}, "lora_fa": {"optimizer": "lora_fa"}}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_with_the_same_bits(name, tiny_bases, tmp_path, monkeypatch):
    spec = make_spec(**RUNS[name], model=tiny_bases["llama"])
    whole, resumed = whole_and_resumed(spec, tmp_path, monkeypatch, 6)
    want, got = whole.read(spec.id), resumed.read(spec.id)
    assert 0 < got.resumed_from_step < spec.steps
    assert got.measures["optimizer_state_gib"] == want.measures["optimizer_state_gib"] > 0
    losses = [json.loads(line)["loss"] for line in (whole.folder(spec.id) / "steps.jsonl").read_text().splitlines()]
    assert losses[-1] != losses[0]


def test_its_default_is_in_no_id_and_each_other_has_an_id_of_its_own():
    plain = make_spec()
    assert "optimizer" not in plain.to_json() and make_spec(optimizer="adamw").id == plain.id
    ids = {make_spec(optimizer=encode(plugins.example("optimizers", name))).id for name in NAMES}
    assert len(ids) == len(NAMES) and plain.id in ids
    spec = make_spec(optimizer="muon")
    assert RunSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_it_is_an_axis_of_a_grid(tmp_path):
    """And told in tables, labels and claims, of runs that do not name it too."""
    text = f"""{BASE}
[[grid]]
method.name = "lora"
optimizer = ["adamw", "muon"]
label = "by {{optimizer.name}}"
[[grid]]
method.name = "lora"
label = "sgd {{optimizer.momentum}}"
optimizer.name = "sgd"
optimizer.momentum = [0.0, 0.9]
[[table]]
rows = ["optimizer.name"]
value = "valid_loss"
[[claim]]
says = "Muon is as good"
measure = "valid_loss"
where = {{ optimizer.name = "adamw" }}
minus = {{ optimizer.name = "muon" }}
at_most = 0.0
"""
    sweep = parse_sweep(tomllib.loads(text), text)
    assert [(run.optimizer.name, getattr(run.optimizer, "momentum", None)) for run in sweep.runs] == [
        ("adamw", None), ("muon", 0.95), ("sgd", 0.0), ("sgd", 0.9),
    ]  # fmt: skip
    assert [*sweep.labels.values()] == ["by adamw", "by muon", "sgd 0.0", "sgd 0.9"]
    assert {"optimizer.name", "optimizer.momentum"} <= {*swept_keys([run.flat for run in sweep.runs])}
    results = load_results(Store(tmp_path), sweep)
    assert results.runs["optimizer.name"].tolist() == ["adamw", "muon", "sgd", "sgd"]


def test_packs_take_the_runs_of_adamw_alone():
    assert packs.key_of(make_spec()) is not None
    assert {name for name in NAMES if packs.key_of(make_spec(optimizer=name))} == {"adamw"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"optimizer": "muno"}, r"optimizer.*'muno'.*Did you mean 'muon'.*Choices: adamw, lora_fa"),
        ({"optimizer": "sgd", "beta2": 0.95}, 'beta2 = 0.95: optimizer "sgd" has none'),
        ({"optimizer": {"name": "sgd", "nesterov": True}}, r"optimizer\.nesterov = true: needs optimizer\.momentum"),
        ({"optimizer": {"name": "muon", "momentum": 1.0}}, r"optimizer\.momentum = 1\.0: must be less than 1"),
        ({"optimizer": {"name": "torch", "type": "Nadam"}}, "optimizer.type.*Did you mean 'NAdam'"),
        ({"optimizer": {"name": "torch", "type": "LBFGS"}}, "LBFGS.*several times a step"),
        ({"optimizer": {"name": "torch", "config": {"beta": 1}}}, r"optimizer\.config\.beta: unknown argument.*betas"),
        ({"optimizer": {"name": "torch", "config": {"eps": -1.0}}}, "Adamax refuses it: Invalid epsilon"),
        ({"optimizer": {"name": "torch", "type": "Rprop"}, "weight_decay": 0.1}, "weight_decay = 0.1: .*has none"),
        ({"optimizer": "lora_fa", "method": FULL}, 'optimizer = "lora_fa": .*method full.*use method.name = "lora"'),
        ({"optimizer": "riemannian", "method": LORA | {"dora": True}}, 'optimizer = "riemannian": .*without dora'),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_key(changes, problem):
    with pytest.raises(InputError, match=problem):
        make_spec(**changes)


def test_muon_is_refused_where_no_matrix_is_trained(tiny_bases):
    spec = make_spec(optimizer="muon", method={"name": "prompt", "num_tokens": 2}, model=tiny_bases["llama"])
    with pytest.raises(InputError, match='optimizer = "muon": method prompt trains no matrix'):
        spec.optimizer.prepare(attach(spec, prepare(spec)), spec)


def test_a_new_head_is_adamw_s(tiny_bases, labelled):
    from lorabench.training.optimizers.muon import matrices

    spec = make_spec(optimizer="muon", model=tiny_bases["bert"], task=SEQUENCES | {"data": labelled})
    model = attach(spec, prepare(spec))
    factors = {id(p) for _, module in tuner_layers(model) for p in module.parameters() if p.requires_grad}
    assert {id(p) for p in matrices(model)} == factors and models.new_heads(model.get_base_model())
