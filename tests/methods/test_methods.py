"""Every method, on every architecture: what is said of ΔW is what the tuned model computes."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch

from lorabench.config import plugins
from lorabench.config.decode import InputError, encode
from lorabench.models import base_model as models
from lorabench.models import weights
from lorabench.training.examples import collate, prepare
from lorabench.training.passes import autocast, forward
from lorabench.training.state import make_optimizer
from lorabench.updates.formats import read_updates
from tests.conftest import make_spec

CPU = torch.device("cpu")
METHODS = plugins.names("methods")
BASES = ["llama", "gpt2", "bert", "roberta"]
IMPOSSIBLE = {("bitfit", "llama"): "no biases"}
"""Pairs that are refused, and why."""
pairs = pytest.mark.parametrize(("name", "base"), [(n, b) for n in METHODS for b in BASES if (n, b) not in IMPOSSIBLE])


def method_spec(name: str, base: str, tiny_bases, labelled, method=None, **changes):
    task = {"name": "text", "max_train": 16, "max_eval": 4}
    if "bert" in base:
        task = {"name": "classification", "data": labelled, "max_train": 16, "max_eval": 4}
    method = encode(plugins.example("methods", name)) | (method or {})
    lr = 1e-3 if base == "roberta" else 5e-3  # whose head of two layers begins to oscillate early
    return make_spec(method=method, model=tiny_bases[base], task=task, **({"lr": lr} | changes))


def attach(spec, examples):
    return spec.method.attach(load_base(spec, examples), spec)


def take_steps(spec, model, examples, steps, first=0):
    """The losses of some steps on one batch."""
    optimizer = make_optimizer(spec, model)
    batch = collate(examples.splits["train"][:4], examples.padding, CPU)
    losses = []
    model.train()
    torch.manual_seed(first)  # of dropout
    for step in range(first, first + steps):
        with autocast(spec, CPU):
            loss = spec.task.loss(forward(model, batch), batch) / spec.task.count(batch)
        penalty = spec.method.penalty(model)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        spec.method.after_step(model, step)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def tuned(spec, steps=15):
    """The model after a few steps, a batch, the losses, and the data."""
    examples = prepare(spec)
    model = attach(spec, examples)
    losses = take_steps(spec, model, examples, steps)
    return model.eval(), collate(examples.splits["train"][:4], examples.padding, CPU), losses, examples


BASES: dict[tuple, tuple] = {}
"""What `load_base` has read, and torch's generator after it."""


def load_base(spec, examples):
    """As a run loads it, torch's generator too; a copy of what was read once, but for a quantized one."""
    method, options = spec.method, examples.model_options
    key = (spec.model, spec.task.auto_class, repr(options), spec.dtype, spec.seed, method.trains_base)
    if key not in BASES or spec.quantization != "none":
        torch.manual_seed(spec.seed)
        base = models.load_base(spec, CPU, options).eval()
        if spec.quantization != "none":
            return base
        BASES[key] = base, torch.get_rng_state()
    base, random = BASES[key]
    torch.set_rng_state(random)
    return copy.deepcopy(base)


@pytest.fixture(scope="module")
def trained(tiny_bases, labelled):
    """`trained(name, base)`: the spec, and what `tuned` gives, made once."""

    @functools.cache
    def make(name, base):
        spec = method_spec(name, base, tiny_bases, labelled)
        return spec, *tuned(spec)

    return make


def dense(model):
    """The model with each quantized linear layer replaced by its dequantized weight."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            linear = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight.data = weights.dequantized(module).float()
            if module.bias is not None:
                linear.bias.data = module.bias.data.float()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    return model


def add(model, updates):
    """W0 + ΔW, in place."""
    for update in updates:
        weights.add_update(model, update)
    return model


@pairs
def test_base_plus_update_is_the_tuned_model(name, base, trained, tmp_path):
    spec, model, batch, losses, examples = trained(name, base)
    with torch.no_grad():
        want, untouched = forward(model, batch), forward(load_base(spec, examples), batch)
    assert (want - untouched).abs().max() > 1e-3  # else the comparison would show nothing
    assert losses[-1] < losses[0]
    updates = list(spec.method.updates(model, lambda: load_base(spec, examples)))
    if spec.method.adds_computation:
        if spec.method.has_update:
            return  # tests of its own
        heads = tuple(models.new_heads(load_base(spec, examples)))
        assert all(update.parameter.startswith(heads) for update in updates)
        return
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    with torch.no_grad():
        for found in (updates, read_updates(tmp_path)):
            got = forward(add(load_base(spec, examples), found), batch)
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pairs
def test_saved_and_loaded_gives_the_same_logits(name, base, trained, tmp_path):
    spec, model, batch, _, examples = trained(name, base)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    loaded = spec.method.load(load_base(spec, examples), tmp_path, spec).eval()
    with torch.no_grad():
        torch.testing.assert_close(forward(loaded, batch), forward(model, batch), atol=2e-5, rtol=1e-4)


@pairs
def test_saving_leaves_what_is_trained_as_it_was(name, base, trained, tmp_path):
    """For training goes on after a snapshot."""
    spec, model, _, _, examples = trained(name, base)
    before = {key: tensor.clone() for key, tensor in spec.method.trained_state(model).items()}
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    after = spec.method.trained_state(model)
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert trainable == {key for key, parameter in model.named_parameters() if parameter.requires_grad}


@pairs
def test_merged_gives_the_same_logits_in_the_base_architecture(name, base, trained):
    spec, model, batch, _, examples = trained(name, base)
    with torch.no_grad():
        want = forward(model, batch)
        merged = spec.method.merge(copy.deepcopy(model))
        if merged is None:
            assert spec.method.adds_computation
            return
        torch.testing.assert_close(forward(merged, batch), want, atol=2e-5, rtol=1e-4)
    shapes = {key: p.numel() for key, p in load_base(spec, examples).named_parameters()}
    merged_shapes = {key: p.numel() for key, p in merged.named_parameters()}
    assert merged_shapes.items() >= shapes.items()
    assert merged_shapes.keys() - shapes.keys() <= {"lm_head.weight"}  # untied to be trained


@pairs
def test_only_what_should_train_changes(name, base, trained):
    spec, model, _, _, examples = trained(name, base)
    torch.manual_seed(spec.seed)
    fresh = attach(spec, examples)
    before = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert before.keys() == after.keys()
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert changed <= trainable
    assert len(changed) > 0.5 * len(trainable)
    heads = models.new_heads(load_base(spec, examples))
    assert all(any(head in key for key in changed) for head in heads)


@pairs
def test_a_checkpoint_goes_on_where_it_was_written(name, base, trained):
    """Trained state, restored into a freshly attached model, then the same steps: the same weights."""
    spec, _, batch, _, examples = trained(name, base)
    spec = replace(spec, steps=8)
    model = attach(spec, examples)
    take_steps(spec, model, examples, 4)
    state = {key: tensor.clone() for key, tensor in spec.method.trained_state(model).items()}
    resumed = attach(spec, examples)
    spec.method.restore(resumed, state)
    take_steps(spec, model, examples, 4, first=4)
    take_steps(spec, resumed, examples, 4, first=4)
    with torch.no_grad():
        torch.testing.assert_close(forward(resumed.eval(), batch), forward(model.eval(), batch), atol=0, rtol=0)
    with pytest.raises(ValueError, match="other parameters"):
        spec.method.restore(resumed, state | {"strange": torch.zeros(1)})


@pytest.mark.parametrize("base", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("name", METHODS)
def test_what_says_so_starts_at_the_base(name, base, trained):
    if (name, base) in IMPOSSIBLE:
        return
    spec, _, batch, _, examples = trained(name, base)
    with torch.no_grad():
        want = forward(load_base(spec, examples), batch)
        got = forward(attach(spec, examples).eval(), batch)
    if spec.method.starts_at_base:
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    elif name != "peft":  # HRA starts there too, but not every tuner does
        assert (got - want).abs().max() > 1e-4


@pytest.mark.parametrize(("name", "base"), IMPOSSIBLE)
def test_a_method_without_a_place_in_the_model_is_refused(name, base, tiny_bases, labelled):
    spec = method_spec(name, base, tiny_bases, labelled)
    with pytest.raises(InputError, match=IMPOSSIBLE[name, base]):
        attach(spec, prepare(spec))


REFUSED = {("full", "nf4"), ("full", "int8"), ("loha", "nf4"), ("lokr", "nf4")}


@pytest.mark.parametrize(("name", "quantization"), sorted(REFUSED))
def test_a_quantization_that_a_method_cannot_have_is_refused(name, quantization):
    with pytest.raises(InputError, match=f'quantization = "{quantization}": .*{name}'):
        make_spec(method={"name": name}, quantization=quantization)


@pytest.mark.parametrize(
    ("name", "quantization"),
    [(n, q) for n in METHODS for q in ("nf4", "int8") if (n, q) not in REFUSED and (n, "llama") not in IMPOSSIBLE],
)
def test_every_method_trains_on_a_quantized_base(name, quantization, tiny_bases, labelled, tmp_path):
    method = {"config": {"n_frequency": 20}, "type": "FOURIERFT"} if name == "peft" else {}
    spec = method_spec(name, "llama", tiny_bases, labelled, method, quantization=quantization)
    model, batch, losses, examples = tuned(spec, steps=8)
    assert losses[-1] < losses[0]
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    with torch.no_grad():
        want = forward(model, batch)
        loaded = spec.method.load(load_base(spec, examples), tmp_path, spec).eval()
        torch.testing.assert_close(forward(loaded, batch), want, atol=1e-3, rtol=1e-3)
        if not spec.method.adds_computation:
            got = forward(add(dense(load_base(spec, examples)), read_updates(tmp_path)), batch)
            # int8 also rounds the activations, which W0 + ΔW knows nothing of.
            tolerance = 1e-3 if quantization == "nf4" else 5e-2
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("base", ["gpt2", "bert"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_in_bfloat16(name, base, tiny_bases, labelled, tmp_path):
    spec = method_spec(name, base, tiny_bases, labelled, dtype="bfloat16")
    model, batch, losses, examples = tuned(spec, steps=8)
    assert min(losses) < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    with torch.no_grad(), autocast(spec, CPU):
        loaded = spec.method.load(load_base(spec, examples), tmp_path, spec).eval()
        want = forward(model, batch).float()
        torch.testing.assert_close(forward(loaded, batch).float(), want, atol=0.05, rtol=0.05)
    if not spec.method.adds_computation:  # ΔW is exact all the same: not a difference of bfloat16 outputs
        updates = spec.method.updates(model, lambda: load_base(spec, examples))
        with torch.no_grad():
            got = forward(add(load_base(spec, examples).float(), updates), batch)
            torch.testing.assert_close(got, forward(model.float(), batch), atol=1e-4, rtol=1e-3)


def test_adalora_may_cut_a_matrix_to_nothing(trained, tmp_path):
    from lorabench.updates.formats import read_layers

    spec, model, _, _, examples = trained("adalora", "llama")
    model = copy.deepcopy(model)
    model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_E["default"].data.zero_()
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    layers = {layer.layer: layer for layer in read_layers(tmp_path)}
    assert layers["model.layers.0.mlp.up_proj"].svd.S.tolist() == [0.0]
    assert layers["model.layers.1.mlp.up_proj"].svd.S[0] > 0


def test_lora_is_peft_own_merge_and_loads_again(tiny_bases, labelled, tmp_path):
    from peft import PeftModel

    spec = method_spec("lora", "gpt2", tiny_bases, labelled)
    model, batch, _, examples = tuned(spec)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    with torch.no_grad():
        want = forward(model, batch)
        loaded = PeftModel.from_pretrained(load_base(spec, examples), tmp_path).eval()
        torch.testing.assert_close(forward(loaded, batch), want, atol=0, rtol=0)
        merged = loaded.merge_and_unload()
        ours = add(load_base(spec, examples), read_updates(tmp_path))
        for (name, a), b in zip(merged.named_parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


def test_evaluation_leaves_a_quantized_base_as_it_is(tiny_bases, labelled):
    """bitsandbytes repacks 4-bit weights on some processors at the first evaluation, and training then goes wrong."""
    spec = method_spec("lora", "llama", tiny_bases, labelled, quantization="nf4")
    model, batch, _, _ = tuned(spec, steps=1)
    before = forward(model.train(), batch).detach()
    with torch.inference_mode():
        forward(model.eval(), batch)
    torch.testing.assert_close(forward(model.train(), batch).detach(), before, atol=0, rtol=0)


@pytest.mark.parametrize("keep", ["svd:1", "svd:3"])
@pytest.mark.parametrize("name", ["full", "lora", "oft"])
def test_kept_singular_vectors_are_those_of_the_update(name, keep, tiny_bases, labelled, tmp_path):
    from lorabench.updates.formats import read_layers

    spec = method_spec(name, "llama", tiny_bases, labelled, keep=keep)
    model, _, _, examples = tuned(spec)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, keep)
    updates = {u.parameter: u for u in spec.method.updates(model, lambda: load_base(spec, examples))}
    layers = list(read_layers(tmp_path))
    assert layers
    for layer in layers:
        want = torch.linalg.svdvals(updates[layer.parameter].dense().double())
        torch.testing.assert_close(layer.svd.S.double(), want[: len(layer.svd.S)], atol=1e-5, rtol=1e-4)
        assert layer.svd.U.shape[1] == min(int(keep[4:]), len(layer.svd.S))


D, KV, F, L, V = 64, 32, 128, 2, 1024
"""Of the tiny Llama: width, width of keys and values, of the feed-forward, layers, vocabulary."""
MATRICES = [(D, D), (KV, D), (KV, D), (D, D), (F, D), (F, D), (D, F)] * L
"""(M, N) of its linear layers."""


def count_lokr(m, n, r):
    """Closed form for a square-ish factorization: W1 (a, c) and B (m / a, r), A (r, n / c)."""
    divisors = lambda k: max(d for d in range(1, int(k**0.5) + 1) if k % d == 0)  # noqa: E731
    a, c = divisors(m), divisors(n)
    return a * c + r * (m // a + n // c)


WIDTH = D // getattr(plugins.example("methods", "adapter"), "reduction", 16)
"""Of the adapter's bottleneck."""
COUNTS = {
    "adalora": sum(4 * (m + n + 1) for m, n in MATRICES),  # start_rank = 4; Zhang et al. 2023, equation 3
    "adapter": L * (2 * D * WIDTH + WIDTH + D),  # Houlsby et al. 2019, section 2.1: 2 m d + d + m each
    "full": 2 * V * D + sum(m * n for m, n in MATRICES) + (2 * L + 1) * D,
    "head": V * D,
    "hybrid": sum(2 * (m + n) for m, n in MATRICES if F not in (m, n)) + L * (2 * D * WIDTH + WIDTH + D),
    "ia3": L * (KV + KV + F),  # Liu et al. 2022, section 3.3: d_k + d_v + d_ff a layer
    "layernorm": (2 * L + 1) * D,
    "loha": sum(2 * 2 * (m + n) for m, n in MATRICES),  # Hyeon-Woo et al. 2022, table 1: 2 R (m + n)
    "lokr": sum(count_lokr(m, n, 2) for m, n in MATRICES),
    "lora": sum(2 * (m + n) for m, n in MATRICES),  # Hu et al. 2021, section 4.2: r (m + n)
    "oft": sum(n // 8 * 8 * 7 // 2 for _, n in MATRICES),  # Qiu et al. 2023: b (b - 1) / 2 a block
    "peft": sum(2 * n for _, n in MATRICES),  # HRA, Yuan et al. 2024: r n
    "prefix": 4 * L * 2 * KV,  # Li and Liang 2021, without re-parameterization
    "prompt": 4 * D,  # Lester et al. 2021
    "ptuning": 4 * D + (D * 32 + 32) + (32 * 32 + 32) + (32 * D + D),
    "vera": sum(16 + m for m, _ in MATRICES),  # Kopiczko et al. 2024, section 3.2: r + M
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in METHODS if (name, "llama") not in IMPOSSIBLE])
def test_it_trains_as_many_parameters_as_its_paper_counts(name, trained):
    _, model, *_ = trained(name, "llama")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == COUNTS[name]


def test_oft_refuses_a_block_that_does_not_divide_the_width(tiny_bases, labelled):
    spec = method_spec("oft", "llama", tiny_bases, labelled, {"block_size": 48})
    with pytest.raises(InputError, match=r"method\.block_size = 48: does not divide 64"):
        attach(spec, prepare(spec))


VARIANTS = {
    "text": ("prompt", {"start": "text", "text": "def f(x): return x"}),
    "random": ("prompt", {"start": "random"}),
    "projection": ("prefix", {"projection": True, "projection_width": 32}),
    "lstm": ("ptuning", {"network": "lstm"}),
    "both": ("lokr", {"decompose_both": True, "rank": 1}),
    "neumann": ("oft", {"cayley_neumann": True}),
    "dense vera": ("vera", {"rank": 256}),
    "dense loha": ("loha", {"rank": 8}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_loads_and_adds_up(variant, tiny_bases, labelled, tmp_path):
    name, fields = VARIANTS[variant]
    spec = method_spec(name, "llama", tiny_bases, labelled, fields)
    model, batch, losses, examples = tuned(spec)
    assert losses[-1] < losses[0]
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    with torch.no_grad():
        want = forward(model, batch)
        loaded = spec.method.load(load_base(spec, examples), tmp_path, spec).eval()
        torch.testing.assert_close(forward(loaded, batch), want, atol=2e-5, rtol=1e-4)
        if spec.method.has_update:
            got = forward(add(load_base(spec, examples), read_updates(tmp_path)), batch)
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_bitfit_trains_every_bias_and_nothing_else(trained):
    _, model, *_ = trained("bitfit", "gpt2")
    biases = L * (3 * D + D + 4 * D + D + 2 * D) + D
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == biases
