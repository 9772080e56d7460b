"""ReLoRA: merged parts add up to ΔW, the optimizer and the learning rate begin anew, and a stop changes no bit."""

from __future__ import annotations

import json

import pytest
import torch

from lorabench.config.decode import InputError
from lorabench.launch import packs
from lorabench.methods._peft import ADAPTER, tuner_layers
from lorabench.spec.run_spec import RunSpec
from lorabench.training.examples import collate, prepare
from lorabench.training.passes import autocast, forward
from lorabench.training.state import make_optimizer
from lorabench.updates.formats import read_layers, read_updates
from tests.conftest import make_spec
from tests.methods.test_methods import CPU, add, attach, load_base, method_spec
from tests.training.test_execute import whole_and_resumed

RELORA = {"restart_every": 2, "alpha": 3.0}


def trained(spec, steps):
    """A model after so many steps of a plain loop, its data, and what each step left the optimizer with."""
    examples = prepare(spec)
    model, kept = attach(spec, examples).train(), []
    optimizer = make_optimizer(spec, model)
    batch = collate(examples.splits["train"][:2], examples.padding, CPU)
    for done in range(1, steps + 1):
        with autocast(spec, CPU):
            loss = spec.task.loss(forward(model, batch), batch) / spec.task.count(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if spec.method.restart(model, spec, done):
            optimizer.state.clear()
        kept.append(len(optimizer.state))
    return model.eval(), examples, batch, kept


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_delta_w_is_the_sum_of_what_was_merged_and_what_is_trained(base, tiny_bases, labelled, tmp_path):
    from peft import PeftModel

    fields = RELORA | {"rank_pattern": {"q_proj|c_attn|query": 3}}
    spec = method_spec("lora", base, tiny_bases, labelled, fields, steps=20)
    model, examples, batch, _ = trained(spec, 7)
    base_model = load_base(spec, examples)
    spec.method.save(model, lambda: base_model, tmp_path, "updates")
    updates = {update.layer: update for update in read_updates(tmp_path)}
    for name, module in tuner_layers(model):
        assert updates[name].A.shape[0] == 4 * module.r[ADAPTER]
        W0 = base_model.get_submodule(name).weight.double()
        W0 = W0.T if base == "gpt2" else W0
        B, A = (getattr(module, f"lora_{side}")[ADAPTER].weight.double() for side in "BA")
        want = module.get_base_layer().weight.double() - W0 + module.scaling[ADAPTER] * B @ A
        torch.testing.assert_close(updates[name].dense().double(), want, atol=1e-6, rtol=1e-4)
        found = {update.layer: update.base_norm for update in spec.method.layer_updates(model, lambda: base_model)}
        assert found[name] == pytest.approx(W0.norm().item(), rel=1e-5)
    with torch.no_grad():
        logits = forward(model, batch)
        for other in (
            add(load_base(spec, examples), updates.values()),
            spec.method.load(load_base(spec, examples), tmp_path, spec).eval(),
            PeftModel.from_pretrained(load_base(spec, examples), tmp_path).eval(),
            spec.method.merge(model),
        ):
            torch.testing.assert_close(forward(other, batch), logits, atol=2e-5, rtol=1e-4)


def test_rank_grows_beyond_that_of_the_factors(tiny_bases, labelled, tmp_path):
    spec = method_spec("lora", "llama", tiny_bases, labelled, RELORA | {"rank": 1}, steps=20)
    model, examples, *_ = trained(spec, 7)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    for layer in read_layers(tmp_path):
        assert int(torch.linalg.matrix_rank(torch.diag(layer.svd.S), rtol=1e-5)) == 4


def test_the_optimizer_and_the_factors_begin_anew_after_each_part_but_the_last(tiny_bases, labelled):
    spec = method_spec("lora", "llama", tiny_bases, labelled, RELORA, steps=6)
    model, _, _, kept = trained(spec, 4)
    assert kept == [28, 0, 28, 0] and len(model.merged) == 2
    for name, module in tuner_layers(model):
        A = module.lora_A[ADAPTER].weight
        assert not module.lora_B[ADAPTER].weight.any() and A.requires_grad
        assert all(not torch.allclose(A, part[name][1]) for part in model.merged)
        assert A.abs().max() <= 64**-0.5 or module.in_features != 64  # kaiming, uniform
    *_, kept = trained(spec, 6)
    assert kept == [28, 0, 28, 0, 28, 28]


def test_what_is_drawn_anew_leaves_the_generators_alone_and_depends_on_seed_and_restart(tiny_bases):
    spec = make_spec(method={"name": "lora", "rank": 2} | RELORA, model=tiny_bases["llama"])
    draws = []
    for seed in (0, 0, 1):
        own = RunSpec.from_json(spec.to_json() | {"seed": seed})
        model = attach(own, prepare(own))
        before = torch.get_rng_state()
        assert [own.method.restart(model, own, done) for done in (1, 2, 3, 4, 6)] == [False, True, False, True, False]
        assert torch.equal(before, torch.get_rng_state())
        first = next(iter(tuner_layers(model)))[0]
        draws.append([model.merged[1][first][1], dict(tuner_layers(model))[first].lora_A[ADAPTER].weight])
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not torch.equal(draws[0][0], draws[0][1]) and not torch.equal(draws[0][0], draws[2][0])


def test_the_rate_rises_again_after_each_restart():
    method = make_spec(method={"name": "lora", "restart_every": 10, "restart_warmup": 0.3}, steps=40).method
    shares = [method.lr_share(done) for done in range(30)]
    assert shares[:10] == [1.0] * 10
    assert shares[10:20] == shares[20:30] == pytest.approx([1 / 3, 2 / 3] + [1.0] * 8)
    assert make_spec().method.lr_share(25) == 1.0


def test_weights_that_are_merged_into_are_held_in_float32(tiny_bases):
    spec = make_spec(method={"name": "lora", "rank": 2} | RELORA, model=tiny_bases["llama"], dtype="bfloat16", steps=20)
    model, examples, *_ = trained(spec, 5)
    base = load_base(spec, examples)
    for update in spec.method.layer_updates(model, lambda: base):
        module = dict(tuner_layers(model))[update.layer]
        own = module.scaling[ADAPTER] * module.lora_B[ADAPTER].weight @ module.lora_A[ADAPTER].weight
        got = base.get_submodule(update.layer).weight.float() + update.dense()
        torch.testing.assert_close(got, module.get_base_layer().weight + own, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["relora", "lora_ga"])
def test_a_run_resumes_with_the_same_bits(name, tiny_bases, tmp_path, monkeypatch):
    """ReLoRA with a snapshot between restarts; what begins from data makes the same of it again."""
    method = {"name": "lora", "rank": 2} | (RELORA if name == "relora" else {"init": name})
    spec = make_spec(method=method, model=tiny_bases["llama"], snapshot_every=3)
    whole, resumed = whole_and_resumed(spec, tmp_path, monkeypatch, 6)
    want, got = whole.read(spec.id), resumed.read(spec.id)
    assert 2 < got.resumed_from_step < spec.steps
    rows = [json.loads(line) for line in (whole.folder(spec.id) / "steps.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows]
    assert len(rates) == 6 and rates[-1] < rates[0]
    start = "" if name == "relora" else "from 16 examples of the training split"
    assert want.provenance.get("start", "").partition(",")[0] == start


def test_a_checkpoint_that_lacks_a_part_is_of_no_use(tiny_bases, labelled):
    spec = method_spec("lora", "llama", tiny_bases, labelled, RELORA, steps=20)
    model, examples, batch, _ = trained(spec, 5)
    state = {name: tensor.clone() for name, tensor in spec.method.trained_state(model).items()}
    again = attach(spec, examples)
    spec.method.restore(again, state)
    with torch.no_grad():
        torch.testing.assert_close(forward(again.eval(), batch), forward(model, batch), atol=0, rtol=0)
    lacking = next(name for name in state if name.startswith("merged:1:"))
    with pytest.raises(ValueError, match="lacks merged:1:"):
        spec.method.restore(attach(spec, examples), {k: v for k, v in state.items() if k != lacking})


def test_such_runs_are_in_no_pack_and_plain_ones_have_their_ids():
    lora = {"name": "lora", "rank": 2}
    assert packs.key_of(make_spec(method=lora | RELORA)) is None
    assert packs.key_of(make_spec(method=lora | {"init": "eva"})) is None
    assert packs.key_of(make_spec(method=lora | {"init": "milora"})) is not None
    assert not {"restart_every", "restart_warmup", "init_examples"} & make_spec(method=lora).to_json()["method"].keys()


def test_shared_out_weights_are_refused():
    from lorabench.training import sharding

    changes = {"method": {"name": "lora", "rank": 2} | RELORA}, {"optimizer": "muon"}
    for each, reason in zip(changes, ("merges into base weights", 'optimizer = "muon"'), strict=True):
        with pytest.raises(InputError, match=f"--sharding fsdp: .*{reason}.*use ddp"):
            sharding.choose(make_spec(**each), "fsdp", CPU, {})
        assert sharding.choose(make_spec(**each), "auto", CPU, {}) == "ddp"
    full = {"method": {"name": "full"}}
    assert sharding.choose(make_spec(**full, optimizer="sgd"), "auto", CPU, {}) == "fsdp"
    assert sharding.choose(make_spec(**full, optimizer="muon"), "auto", CPU, {}) == "ddp"


@pytest.mark.parametrize(
    ("method", "changes", "problem"),
    [
        ({}, {"quantization": "nf4"}, 'restart_every = 2: merges into the base weights, and quantized ones .*"nf4"'),
        ({"init": "pissa"}, {}, 'restart_every = 2: draws A anew.*not method.init = "pissa"'),
        ({"dora": True}, {}, "restart_every = 2: only without dora"),
        ({"restart_every": 0}, {}, r"method\.restart_every = 0: must be at least 1"),
        ({"restart_every": None, "restart_warmup": 0.5}, {}, "restart_warmup = 0.5: there is none without"),
    ],
)
def test_what_cannot_be_is_refused_with_the_key(method, changes, problem):
    with pytest.raises(InputError, match=problem):
        make_spec(method={"name": "lora", "rank": 2, "restart_every": 2} | method, **changes)
