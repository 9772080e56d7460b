"""LoRA's variants against PEFT's own, after the same steps from the same seed, and their ΔW against dense algebra."""

from __future__ import annotations

import copy

import pytest
import torch

from lorabench.config.decode import InputError, encode
from lorabench.models import base_model as models
from lorabench.models import weights
from lorabench.spec.run_spec import flatten, unflatten
from lorabench.training.examples import collate, prepare
from lorabench.training.passes import forward
from lorabench.updates.formats import open_layers, read_updates
from tests.conftest import make_spec
from tests.methods.test_methods import CPU, add, attach, load_base, method_spec, take_steps, tuned

QUERY, DOWN = "q_proj|c_attn|query", r"down_proj|mlp\.c_proj|output\.dense"
VARIANTS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "pissa-rslora": {"init": "pissa", "rslora": True},
    "patterns": {"rank_pattern": {QUERY: 4}, "alpha_pattern": {DOWN: 1.0}},
    "pissa-patterns": {"init": "pissa", "rank_pattern": {QUERY: 4}, "alpha_pattern": {DOWN: 1.0}},
    "pissa-rslora-patterns": {"init": "pissa", "rslora": True, "rank_pattern": {QUERY: 4}},
    "layers": {"layers": "1"},
    "embeddings": {"embeddings": True, "head": True},
}


def peft_config(method, names):
    """The same in PEFT's own words."""
    from peft import LoraConfig

    ranks = method.get("rank_pattern", {})
    alphas = {name: 2 * rank for name, rank in ranks.items()} | method.get("alpha_pattern", {})  # alpha = "2r"
    extra = {"rank_pattern": ranks, "alpha_pattern": alphas}
    if method.get("embeddings"):
        names = [*names, "model.embed_tokens", "lm_head"]
    if method.get("layers"):
        names = [name for name in names if f".{method['layers']}." in name]
    init = method.get("init", True)
    return LoraConfig(
        r=2, lora_alpha=4, target_modules=names, init_lora_weights=init,
        use_rslora=method.get("rslora", False), use_dora=method.get("dora", False), task_type="CAUSAL_LM", **extra,
    )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_peft_own_after_the_same_steps(variant, tiny_bases, labelled, tmp_path):
    from peft import get_peft_model

    spec = method_spec("lora", "llama", tiny_bases, labelled, VARIANTS[variant])
    examples = prepare(spec)
    ours = attach(spec, examples)
    take_steps(spec, ours, examples, 8)
    base = load_base(spec, examples)
    linear = [name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    torch.manual_seed(spec.seed)
    base = models.load_base(spec, CPU, {})
    theirs = get_peft_model(base, peft_config(VARIANTS[variant], linear), autocast_adapter_dtype=False)
    take_steps(spec, theirs, examples, 8)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, msg=name)
    before = dict(load_base(spec, examples).named_parameters())
    merged = dict(theirs.merge_and_unload().named_parameters())
    spec.method.save(ours, lambda: load_base(spec, examples), tmp_path, "updates")
    updates = list(read_updates(tmp_path))
    assert len(updates) == {"layers": 7, "embeddings": 16}.get(variant, 14)
    for update in updates:
        change = merged[update.parameter] - before[update.parameter]
        change = change.T if update.layer.endswith("embed_tokens") else change
        torch.testing.assert_close(update.dense(), change, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", ["llama", "gpt2", "bert"])
def test_variant_loads_onto_the_untouched_base_with_peft_alone(variant, base, tiny_bases, labelled, tmp_path):
    from peft import PeftModel

    if base == "bert" and variant == "embeddings":
        pytest.skip("a classifier has no output matrix")
    spec = method_spec("lora", base, tiny_bases, labelled, VARIANTS[variant])
    model, batch, _, examples = tuned(spec)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    with torch.no_grad():
        want = forward(model, batch)
        loaded = PeftModel.from_pretrained(load_base(spec, examples), tmp_path).eval()
        torch.testing.assert_close(forward(loaded, batch), want, atol=2e-5, rtol=1e-4)
        ours = spec.method.load(load_base(spec, examples), tmp_path, spec).eval()
        torch.testing.assert_close(forward(ours, batch), want, atol=2e-5, rtol=1e-4)
        got = forward(add(load_base(spec, examples), read_updates(tmp_path)), batch)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        merged = spec.method.merge(copy.deepcopy(model))
        torch.testing.assert_close(forward(merged, batch), want, atol=2e-5, rtol=1e-4)


def test_dora_gives_its_low_rank_part_apart(tiny_bases, labelled, tmp_path):
    spec = method_spec("lora", "llama", tiny_bases, labelled, {"dora": True})
    model, _, _, examples = tuned(spec)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    entries = open_layers(tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    B, A = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
    part = entries[f"{name}[sBA].weight"].load()
    torch.testing.assert_close(part.dense(), 2 * B @ A)
    W = load_base(spec, examples).get_parameter(f"{name}.weight").detach()
    m = layer.lora_magnitude_vector["default"].weight.detach()
    whole = W + 2 * B @ A
    want = m[:, None] * whole / whole.norm(dim=1, keepdim=True) - W
    torch.testing.assert_close(entries[f"{name}.weight"].load().dense(), want, atol=2e-6, rtol=1e-4)
    assert torch.linalg.matrix_rank(want, atol=1e-5) > 2


def test_pissa_begins_at_the_principal_directions_and_at_no_change(tiny_bases, labelled):
    spec = method_spec("lora", "llama", tiny_bases, labelled, {"init": "pissa"})
    examples = prepare(spec)
    model = attach(spec, examples).eval()
    batch = collate(examples.splits["train"][:4], examples.padding, CPU)
    with torch.no_grad():
        torch.testing.assert_close(
            forward(model, batch), forward(load_base(spec, examples), batch), atol=1e-5, rtol=1e-4
        )
    updates = list(spec.method.updates(model, lambda: load_base(spec, examples)))
    assert all(update.B.shape[1] == 4 and update.dense().abs().max() < 1e-6 for update in updates)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    W = load_base(spec, examples).get_parameter("model.layers.0.self_attn.q_proj.weight").detach()
    U, S, Vh = torch.linalg.svd(W)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    torch.testing.assert_close(product.detach(), U[:, :2] * S[:2] @ Vh[:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_loftq_begins_nearer_to_the_exact_weights_and_counts_from_there(quantization, tiny_bases, labelled, tmp_path):
    spec = method_spec("lora", "llama", tiny_bases, labelled, {"init": "loftq"}, quantization=quantization)
    examples = prepare(spec)
    model = attach(spec, examples)
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    Q = weights.dequantized(layer.get_base_layer()).float()
    W = load_base(make_spec(model=spec.model), examples).get_parameter(f"{name}.weight").detach()
    start = Q + layer.get_delta_weight("default").detach()
    U, S, Vh = torch.linalg.svd(W - Q)
    torch.testing.assert_close(start, Q + U[:, :2] * S[:2] @ Vh[:2], atol=1e-5, rtol=1e-3)
    assert (W - start).norm() < (W - Q).norm()
    take_steps(spec, model, examples, 8)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    want = Q + layer.get_delta_weight("default").detach() - start
    update = next(u for u in read_updates(tmp_path) if u.layer == name)
    torch.testing.assert_close(update.dense(), want, atol=1e-6, rtol=1e-4)
    batch = collate(examples.splits["train"][:4], examples.padding, CPU)
    with torch.no_grad():  # the adapter itself holds s B A, for the quantized base
        loaded = spec.method.load(load_base(spec, examples), tmp_path, spec).eval()
        torch.testing.assert_close(forward(loaded, batch), forward(model.eval(), batch), atol=1e-4, rtol=1e-4)


def test_lora_plus_is_peft_own_optimizer_groups(tiny_bases, labelled):
    from peft.optimizers import create_loraplus_optimizer

    spec = method_spec("lora", "llama", tiny_bases, labelled, {"lr_ratio": 16.0})
    model = attach(spec, prepare(spec))
    theirs = create_loraplus_optimizer(
        model, optimizer_cls=torch.optim.AdamW, lr=spec.lr, loraplus_lr_ratio=16.0, weight_decay=0.0
    )
    rate = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    ours = {id(p): group["lr"] for group in spec.method.param_groups(model, spec.lr) for p in group["params"]}
    assert ours == rate
    assert set(ours.values()) == {spec.lr, 16 * spec.lr}


@pytest.mark.parametrize(
    ("alpha", "rslora", "want"), [(16.0, False, 8.0), ("2r", False, 2.0), (16.0, True, 16 / 2**0.5)]
)
def test_lora_scale(alpha, rslora, want, tiny_bases, labelled):
    from peft.tuners.lora import LoraLayer

    spec = method_spec("lora", "llama", tiny_bases, labelled, {"alpha": alpha, "rslora": rslora})
    model = tuned(spec, steps=1)[0]
    scales = {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)}
    assert sorted(scales) == [pytest.approx(want)]


@pytest.mark.parametrize(
    ("method", "changes", "problem"),
    [
        ({"init": "pissa"}, {"quantization": "nf4"}, 'method.init = "pissa"'),
        ({"init": "loftq"}, {}, 'method.init = "loftq"'),
        ({"init": "orthogonal", "rank": 3}, {}, "needs even ranks"),
        ({"init": "pissa", "dora": True}, {}, "method.dora = true"),
        ({"alpha": "r2"}, {}, 'method.alpha = "r2"'),
        ({"rank_pattern": {"q_proj": 0}}, {}, "method.rank_pattern"),
        ({"lr_ratio": 0.0}, {}, "method.lr_ratio"),
        ({"rank_pattern": {"q_proj(": 4}}, {}, "not a regular expression"),
        ({"alpha": 0.0}, {}, "method.alpha = 0.0"),
        ({"alpha": "0r"}, {}, 'method.alpha = "0r": must be greater than 0'),
        ({"init": "pissa", "head": True}, {}, "method.head = true"),
        ({"dora": True, "embeddings": True}, {}, "method.embeddings = true"),
    ],
)
def test_impossible_combinations_are_refused_with_the_key(method, changes, problem):
    with pytest.raises(InputError) as error:
        make_spec(method={"name": "lora", "rank": 2} | method, **changes)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("layers", "problem"), [("0-9", "there is no layer 2"), ("a", "must be numbers"), ("3-1", "must")]
)
def test_layers_that_are_not_there_are_refused(layers, problem, tiny_bases, labelled):
    spec = method_spec("lora", "llama", tiny_bases, labelled, {"layers": layers})
    with pytest.raises(InputError, match=f'method.layers = "{layers}": .*{problem}'):
        attach(spec, prepare(spec))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_fits_nothing_is_refused(key, tiny_bases, labelled):
    spec = method_spec("lora", "llama", tiny_bases, labelled, {key: {"q_prooj": 4}})
    with pytest.raises(InputError, match=f'method.{key}: "q_prooj": fits none of the targets: down_proj'):
        attach(spec, prepare(spec))


def test_pissa_s_change_is_held_against_the_whole_weight(tiny_bases, labelled, tmp_path):
    spec = method_spec("lora", "gpt2", tiny_bases, labelled, {"init": "pissa", "rslora": True})
    model, _, _, examples = tuned(spec)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    base = load_base(spec, examples)
    for update in read_updates(tmp_path):
        assert update.base_norm == pytest.approx(float(base.get_parameter(update.parameter).norm()), rel=1e-4)


def test_an_adapter_file_holds_factors_alone(tiny_bases, labelled, tmp_path):
    from safetensors.torch import load_file

    spec = method_spec("lora", "llama", tiny_bases, labelled, {"embeddings": True, "head": True})
    model, _, _, examples = tuned(spec, steps=1)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("pattern", [{"q_proj": 4}, {r"layers\.0\..*_proj": 4, "v_proj": 2}])
def test_patterns_pass_through_flat_keys(pattern):
    spec = make_spec(method={"name": "lora", "rank_pattern": pattern})
    table = spec.to_json()
    assert unflatten(flatten(table))["method"]["rank_pattern"] == pattern
    assert encode(type(spec).from_json(unflatten(flatten(table))).method) == encode(spec.method)
