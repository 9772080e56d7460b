"""Every method, on every architecture: what is said of ΔW is what the tuned model computes."""

from __future__ import annotations

import pytest
import torch

from lorabench import model as models
from lorabench import plugins
from lorabench.decode import encode
from lorabench.examples import collate, prepare
from lorabench.formats import read_updates
from lorabench.train import forward, make_optimizer
from tests.conftest import make_spec

CPU = torch.device("cpu")
METHODS = plugins.names("methods")


def method_spec(name: str, base: str, tiny_bases, labelled, **changes):
    task = {"name": "text", "max_train": 16, "max_eval": 4}
    if "bert" in base:
        task = {"name": "classification", "data": labelled, "max_train": 16, "max_eval": 4}
    method = encode(plugins.example("methods", name))
    return make_spec(method=method, model=tiny_bases[base], task=task, **({"lr": 5e-3} | changes))


def tuned(spec, steps=15):
    """The model after a few steps, its base, and a batch."""
    examples = prepare(spec)
    torch.manual_seed(spec.seed)
    model = spec.method.attach(models.load_base(spec, CPU, examples.model_options))
    optimizer = make_optimizer(spec, model)
    batch = collate(examples.splits["train"][:4], examples.padding, CPU)
    losses = []
    model.train()
    for step in range(steps):
        loss = spec.task.loss(forward(model, batch), batch) / spec.task.count(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spec.method.after_step(model, step)
        losses.append(float(loss.detach()))
    return model.eval(), batch, losses, examples


def load_base(spec, examples):
    torch.manual_seed(spec.seed)
    return models.load_base(spec, CPU, examples.model_options).eval()


def dense(model):
    """The model with each quantized linear layer replaced by its dequantized weight."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            linear = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight.data = models.dequantized(module).float()
            if module.bias is not None:
                linear.bias.data = module.bias.data.float()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    return model


def add(model, updates):
    """W0 + ΔW, in place."""
    parameters = dict(model.named_parameters())
    for update in updates:
        parameter = parameters[update.parameter]
        delta = update.dense()
        if models.is_transposed(model.get_submodule(update.parameter.rpartition(".")[0])):
            delta = delta.T
        parameter.data += delta.reshape(parameter.shape)
    return model


@pytest.mark.parametrize("base", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("name", METHODS)
def test_base_plus_update_is_the_tuned_model(name, base, tiny_bases, labelled, tmp_path):
    spec = method_spec(name, base, tiny_bases, labelled)
    model, batch, losses, examples = tuned(spec)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    with torch.no_grad():
        want, untouched = forward(model, batch), forward(load_base(spec, examples), batch)
        for updates in (spec.method.updates(model, lambda: load_base(spec, examples)), read_updates(tmp_path)):
            got = forward(add(load_base(spec, examples), updates), batch)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert (want - untouched).abs().max() > 1e-3  # else the comparison would show nothing
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_base_plus_update_is_the_tuned_model(quantization, tiny_bases, labelled, tmp_path):
    spec = method_spec("lora", "llama", tiny_bases, labelled, quantization=quantization)
    model, batch, losses, examples = tuned(spec)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    with torch.no_grad():
        want = forward(model, batch)
        got = forward(add(dense(load_base(spec, examples)), read_updates(tmp_path)), batch)
    # int8 also rounds the activations, which W0 + ΔW knows nothing of.
    tolerance = 1e-4 if quantization == "nf4" else 5e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("base", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("name", METHODS)
def test_only_what_should_train_changes(name, base, tiny_bases, labelled):
    spec = method_spec(name, base, tiny_bases, labelled)
    examples = prepare(spec)
    torch.manual_seed(0)
    model = spec.method.attach(models.load_base(spec, CPU, examples.model_options))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    after = dict(tuned(spec)[0].named_parameters())
    changed = {key for key, p in after.items() if not torch.equal(p, before[key])}
    assert changed <= trainable
    assert len(changed) > 0.5 * len(trainable)


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


def test_lora_trains_the_parameters_that_its_paper_counts(tiny_bases, labelled):
    """r (M + N) for each matrix: section 4.2 of Hu et al. 2021."""
    spec = method_spec("lora", "llama", tiny_bases, labelled)
    model = tuned(spec, steps=0)[0]
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)] * 2
    got = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert got == sum(spec.method.rank * (m + n) for m, n in shapes)


@pytest.mark.parametrize(
    ("alpha", "rslora", "want"), [(16.0, False, 8.0), ("2r", False, 2.0), (16.0, True, 16 / 2**0.5)]
)
def test_lora_scale(alpha, rslora, want, tiny_bases, labelled):
    spec = method_spec("lora", "llama", tiny_bases, labelled)
    method = encode(spec.method) | {"alpha": alpha, "rslora": rslora}
    from peft.tuners.lora import LoraLayer

    model = tuned(make_spec(method=method, model=tiny_bases["llama"]), steps=1)[0]
    scales = {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)}
    assert sorted(scales) == [pytest.approx(want)]


def test_evaluation_leaves_a_quantized_base_as_it_is(tiny_bases, labelled):
    """bitsandbytes repacks 4-bit weights on some processors at the first evaluation, and training then goes wrong."""
    spec = method_spec("lora", "llama", tiny_bases, labelled, quantization="nf4")
    model, batch, _, _ = tuned(spec, steps=1)
    before = forward(model.train(), batch).detach()
    with torch.inference_mode():
        forward(model.eval(), batch)
    torch.testing.assert_close(forward(model.train(), batch).detach(), before, atol=0, rtol=0)


@pytest.mark.parametrize("keep", ["svd:1", "svd:3"])
def test_kept_singular_vectors_are_those_of_the_update(keep, tiny_bases, labelled, tmp_path):
    from lorabench.formats import read_layers

    spec = method_spec("full", "llama", tiny_bases, labelled, keep=keep)
    model, _, _, examples = tuned(spec)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, keep)
    updates = {u.parameter: u for u in spec.method.updates(model, lambda: load_base(spec, examples))}
    layers = list(read_layers(tmp_path))
    assert layers
    for layer in layers:
        want = torch.linalg.svdvals(updates[layer.parameter].dense().double())
        torch.testing.assert_close(layer.svd.S.double(), want, atol=1e-5, rtol=1e-4)
        assert layer.svd.U.shape[1] == min(int(keep[4:]), len(want))
