"""Initializations from weights and from data, against PEFT's own and against their definitions in float64."""

from __future__ import annotations

import pytest
import torch

from lorabench.config.decode import InputError
from lorabench.methods import _starts
from lorabench.methods._peft import ADAPTER, tuner_layers
from lorabench.spec.run_spec import RunSpec
from lorabench.training.examples import Order, collate, prepare
from lorabench.training.passes import forward
from lorabench.training.starting import start_from_data
from lorabench.updates.formats import read_updates
from tests.conftest import make_spec
from tests.methods.test_methods import CPU, add, attach, load_base, method_spec, take_steps

INITS = ["milora", "eva", "corda", "lora_ga"]


def started(spec):
    """The model where training begins, the untouched base, and the examples that it has begun from."""
    examples = prepare(spec)
    model = attach(spec, examples)
    start_from_data(spec, model, examples)
    rows = examples.splits["train"]
    chosen = Order(len(rows), min(spec.method.init_examples, len(rows)), spec.seed).indices(0)
    batches = [collate([rows[index]], examples.padding, CPU) for index in chosen]
    return model, load_base(spec, examples), batches


def spec_of(init, tiny_bases, base="llama", labelled=None, **fields):
    examples = {} if init == "milora" else {"init_examples": 4}
    return method_spec("lora", base, tiny_bases, labelled, {"init": init, "alpha": 3.0} | examples | fields)


def products(model):
    """s B A of each layer, in float64."""
    return {
        name: m.scaling[ADAPTER] * m.lora_B[ADAPTER].weight.double() @ m.lora_A[ADAPTER].weight.double()
        for name, m in tuner_layers(model)
    }


@pytest.mark.parametrize(
    ("init", "base"), [*((init, "llama") for init in INITS), ("eva", "gpt2"), ("corda", "gpt2"), ("lora_ga", "bert")]
)
def test_it_begins_at_the_base_trains_and_counts_from_the_untouched_weights(init, base, tiny_bases, labelled, tmp_path):
    spec = spec_of(init, tiny_bases, base, labelled, rank_pattern={"q_proj|c_attn|query": 4})
    model, untouched, batches = started(spec)
    batch, examples = batches[0], prepare(spec)
    with torch.no_grad():
        torch.testing.assert_close(forward(model.eval(), batch), forward(untouched, batch), atol=2e-5, rtol=1e-4)
    assert all(update.dense().abs().max() < 1e-6 for update in spec.method.layer_updates(model, lambda: untouched))
    losses = take_steps(spec, model, examples, 8)
    assert losses[-1] < losses[0]
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    with torch.no_grad():
        want = forward(model.eval(), batch)
        got = forward(add(load_base(spec, examples), read_updates(tmp_path)), batch)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        loaded = spec.method.load(load_base(spec, examples), tmp_path, spec).eval()
        torch.testing.assert_close(forward(loaded, batch), want, atol=2e-5, rtol=1e-4)


def test_milora_takes_the_smallest_singular_values_out(tiny_bases):
    model, untouched, _ = started(spec_of("milora", tiny_bases))
    for name, product in products(model).items():
        U, S, Vh = torch.linalg.svd(untouched.get_submodule(name).weight.double(), full_matrices=False)
        torch.testing.assert_close(product, U[:, -2:] * S[-2:] @ Vh[-2:], atol=1e-6, rtol=1e-4)


def inputs_of(model, batches):
    """What each linear layer of an untouched base is given by the examples: their positions, example by example."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0][0].double()))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            forward(model, batch)
    for hook in hooks:
        hook.remove()
    return seen


def test_eva_is_the_directions_of_most_variance(tiny_bases):
    model, untouched, batches = started(spec_of("eva", tiny_bases))
    seen = inputs_of(untouched, batches)
    for name, module in tuner_layers(model):
        x = torch.cat(seen[name])
        _, _, Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        A = module.lora_A[ADAPTER].weight.double()
        torch.testing.assert_close((A @ Vh[:2].T).abs(), torch.eye(2).double(), atol=1e-5, rtol=0)
        assert not module.lora_B[ADAPTER].weight.any()


def peft_model(init, base, names, **own):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=3, target_modules=names, init_lora_weights=init, task_type="CAUSAL_LM", **own)
    return config, lambda: get_peft_model(base, config, autocast_adapter_dtype=False)


def test_eva_is_peft_own_with_an_exact_svd(tiny_bases, monkeypatch):
    from peft import EvaConfig
    from peft.tuners.lora import initialize_lora_eva_weights
    from peft.utils.incremental_pca import IncrementalPCA

    monkeypatch.setattr(IncrementalPCA, "_svd_fn_lowrank", IncrementalPCA._svd_fn_full)

    ours, base, batches = started(spec_of("eva", tiny_bases, init_examples=1))
    names = [name for name, _ in tuner_layers(ours)]
    _, make = peft_model("eva", base, names, eva_config=EvaConfig(rho=1.0, tau=0.0, use_label_mask=False))
    theirs, inputs = make(), {"input_ids": batches[0]["input_ids"]}
    initialize_lora_eva_weights(theirs, [inputs, inputs, inputs], show_progress_bar=False)
    for (name, a), (_, b) in zip(tuner_layers(ours), tuner_layers(theirs), strict=True):
        overlap = a.lora_A[ADAPTER].weight @ b.lora_A[ADAPTER].weight.T
        torch.testing.assert_close(overlap.abs(), torch.eye(2), atol=1e-3, rtol=0, msg=name)


def test_corda_is_peft_own(tiny_bases):
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    ours, base, batches = started(spec_of("corda", tiny_bases))
    names = [name for name, _ in tuner_layers(ours)]
    config, make = peft_model("corda", base, names, corda_config=CordaConfig(corda_method="ipm"))
    preprocess_corda(base, config, run_model=lambda: [forward(base, batch) for batch in batches])
    for (name, a), (_, b) in zip(tuner_layers(ours), tuner_layers(make()), strict=True):
        sign = (a.lora_A[ADAPTER].weight * b.lora_A[ADAPTER].weight).sum(1).sign()
        for mine, other in (
            (a.lora_A[ADAPTER].weight, sign[:, None] * b.lora_A[ADAPTER].weight),
            (a.lora_B[ADAPTER].weight, b.lora_B[ADAPTER].weight * sign),
            (a.get_base_layer().weight, b.get_base_layer().weight),
        ):
            torch.testing.assert_close(mine, other, atol=2e-3 * float(other.detach().abs().max()), rtol=0, msg=name)


def backward(base, batches, spec):
    for batch in batches:
        (spec.task.loss(forward(base, batch), batch) / spec.task.count(batch)).backward()


def test_lora_ga_begins_along_the_gradient(tiny_bases):
    """A and B are singular vectors of it, of norm M^¼ / √γ; the first step goes along its best approximation."""
    spec = spec_of("lora_ga", tiny_bases)
    model, untouched, batches = started(spec)
    backward(untouched, batches, spec)
    for name, module in tuner_layers(model):
        U, _, Vh = torch.linalg.svd(untouched.get_submodule(name).weight.grad.double(), full_matrices=False)
        A, B = module.lora_A[ADAPTER].weight.double(), module.lora_B[ADAPTER].weight.double()
        length = module.out_features**0.25 / 4
        torch.testing.assert_close((A @ Vh[:2].T).abs(), length * torch.eye(2).double(), atol=1e-4, rtol=0)
        torch.testing.assert_close((U[:, 2:4].T @ B).abs(), length * torch.eye(2).double(), atol=1e-4, rtol=0)


def test_lora_ga_has_the_directions_of_peft(tiny_bases):
    """The directions alone: PEFT's B has the gradient's singular values as well, and its A is of norm 1."""
    from peft.tuners.lora import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    spec = spec_of("lora_ga", tiny_bases)
    ours, base, batches = started(spec)
    names = [name for name, _ in tuner_layers(ours)]
    config, make = peft_model("lora_ga", base, names, lora_ga_config=LoraGAConfig())
    preprocess_loraga(base, config, lambda: backward(base, batches, spec))
    for (name, a), (_, b) in zip(tuner_layers(ours), tuner_layers(make()), strict=True):
        for mine, other in (
            (a.lora_A[ADAPTER].weight, b.lora_A[ADAPTER].weight),
            (a.lora_B[ADAPTER].weight.T, b.lora_B[ADAPTER].weight.T),
        ):
            cosines = torch.nn.functional.cosine_similarity(mine, other).abs()
            assert cosines.min() > 0.98, name  # its SVD is approximate


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_layers_a_few_at_a_time_give_the_same(init, tiny_bases, monkeypatch):
    spec = spec_of(init, tiny_bases)
    model, *_ = started(spec)
    monkeypatch.setattr(_starts, "AT_A_TIME", 2**16)
    again, *_ = started(spec)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, msg=name)


def test_the_order_s_seed_says_which_examples(tiny_bases):
    spec = spec_of("eva", tiny_bases, init_examples=2)
    about = start_from_data(spec, attach(spec, prepare(spec)), prepare(spec))
    assert about.startswith("from 2 examples of the training split, ") and about.endswith("of seed 0")
    other = RunSpec.from_json(spec.to_json() | {"seed": 1})
    a, b = (next(iter(tuner_layers(started(each)[0])))[1].lora_A[ADAPTER].weight for each in (spec, other))
    assert not torch.allclose(a.abs(), b.abs(), atol=1e-3)


def test_eva_begins_on_a_quantized_base(tiny_bases):
    spec = RunSpec.from_json(spec_of("eva", tiny_bases).to_json() | {"quantization": "nf4"})
    model, *_ = started(spec)
    for _, module in tuner_layers(model):
        A = module.lora_A[ADAPTER].weight
        torch.testing.assert_close(A @ A.T, torch.eye(2), atol=1e-5, rtol=0)


def test_what_is_taken_out_is_rounded_as_the_factors_are(tiny_bases):
    spec = spec_of("milora", tiny_bases, adapter_dtype="bfloat16")
    model, untouched, _ = started(spec)
    for name, module in tuner_layers(model):
        got = module.get_base_layer().weight.double() + products(model)[name]
        torch.testing.assert_close(got, untouched.get_submodule(name).weight.double(), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "changes", "problem"),
    [
        ({"init": "corda"}, {"quantization": "nf4"}, 'method.init = "corda": takes its factors out of the base'),
        ({"init": "milora"}, {"quantization": "int8"}, 'method.init = "milora": takes its factors out of the base'),
        ({"init": "milora", "dora": True}, {}, 'method.dora = true: cannot be had with method.init = "milora"'),
        ({"init": "eva", "head": True}, {}, "method.head = true: only without dora"),
        (
            {"init": "pissa", "init_examples": 8},
            {},
            'method.init_examples = 8: method.init = "pissa" has none, only eva',
        ),
        ({"init": "lora-ga"}, {}, "Did you mean 'lora_ga'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_key(method, changes, problem):
    with pytest.raises(InputError, match=problem):
        make_spec(method={"name": "lora", "rank": 2} | method, **changes)


@pytest.mark.parametrize(("init", "most"), [("eva", 64), ("corda", 32), ("lora_ga", 16)])
def test_a_rank_above_the_directions_is_refused_by_layer(init, most, tiny_bases):
    spec = spec_of(init, tiny_bases, rank=most, targets="k_proj")
    attach(spec, prepare(spec))
    spec = spec_of(init, tiny_bases, rank=most + 1, targets="k_proj")
    with pytest.raises(InputError, match=rf'method.init = "{init}": .*k_proj, 32 by 64, can have rank {most} at most'):
        attach(spec, prepare(spec))


def test_too_few_tokens_are_told(tiny_bases):
    spec = spec_of("eva", tiny_bases, rank=60, init_examples=1)
    with pytest.raises(InputError, match=r"method\.init_examples = 1: .* of rank 60 is given 3\d tokens by them"):
        started(spec)


def test_a_layer_of_which_the_examples_tell_nothing_is_told(tiny_bases):
    spec = spec_of("lora_ga", tiny_bases)
    model = attach(spec, prepare(spec))
    zero = torch.zeros((), requires_grad=True)
    with pytest.raises(InputError, match=r"method\.init_examples = 1: they tell nothing of model\.layers\.0"):
        spec.method.begin_from_data(model, [lambda: zero * 1])
    assert not any(p.requires_grad for name, p in model.named_parameters() if "base_layer" in name)
