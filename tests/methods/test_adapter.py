"""Bottleneck adapters: what is computed, trained, saved and copied, against a reimplementation and closed forms."""

from __future__ import annotations

import copy
import json
from itertools import product

import pytest
import torch
import transformers
from torch.nn import functional as F

from lorabench.config.decode import InputError
from lorabench.launch import plan
from lorabench.models import base_model as models
from lorabench.models.base_model import BUILTIN
from lorabench.training.examples import collate, prepare
from lorabench.training.passes import forward
from lorabench.training.state import make_optimizer
from lorabench.updates.formats import read_updates
from tests import families
from tests.conftest import make_spec

CPU = torch.device("cpu")
PLACEMENTS = ["houlsby", "pfeiffer", "parallel"]
BASES = ["llama", "gpt2", "bert", "distilbert", "t5", "bart"]
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
WIDTH, BOTTLENECK = 64, 8
LAYERS = dict.fromkeys([*BASES, "roberta"], 2) | {"t5": 4, "bart": 4}
"""Of encoder and decoder together."""
PAIRS = {"name": "seq2seq", "data": "builtin:arithmetic", "source": "{prompt}", "target": "{response}"}
HEAD = {"bert": 2 * 64 + 2, "roberta": 64 * 64 + 64 + 2 * 64 + 2, "distilbert": 64 * 64 + 64 + 2 * 64 + 2}
"""Parameters of a new head for two classes."""


@pytest.fixture(scope="module")
def bases(tiny_bases, encoder_decoders, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("distilbert")
    config = transformers.DistilBertConfig(
        dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=128, vocab_size=1024, pad_token_id=2,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    transformers.DistilBertModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(BUILTIN / "tiny-llama").save_pretrained(folder)
    return tiny_bases | encoder_decoders | {"distilbert": str(folder)}


@pytest.fixture
def spec_of(bases, labelled):
    def make(base, method=None, **changes):
        task = {"name": "text", "max_train": 16, "max_eval": 4}
        if "bert" in base:
            task = {"name": "classification", "data": labelled, "max_train": 16, "max_eval": 4}
        if base in ("t5", "bart"):
            task = PAIRS | {"max_train": 16, "max_eval": 4}
        table = {"name": "adapter", "reduction": WIDTH // BOTTLENECK} | (method or {})
        return make_spec(method=table, model=bases[base], task=task, **({"lr": 5e-3} | changes))

    return make


def load_base(spec):
    torch.manual_seed(spec.seed)
    return models.load_base(spec, CPU, prepare(spec).model_options).eval()


def attach(spec):
    return spec.method.attach(load_base(spec), spec)


def adapters(model):
    """In the order of the forward pass."""
    return [module for name, module in model.named_modules() if name.endswith("bottleneck")]


def randomized(spec):
    """A model whose adapters and new head have random weights, which change what it computes."""
    model = attach(spec)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3
    return model


def a_batch(spec, size=4):
    examples = prepare(spec)
    return collate(examples.splits["train"][:size], examples.padding, CPU)


def train(spec, model, steps):
    optimizer, batch, losses = make_optimizer(spec, model), a_batch(spec), []
    model.train()
    for _ in range(steps):
        loss = spec.task.loss(forward(model, batch), batch) / spec.task.count(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def difference(model, other, spec):
    with torch.no_grad():
        return float((forward(model, a_batch(spec)) - forward(other, a_batch(spec))).abs().max())


# What the papers say, written down a second time. `A` is the list of a block's adapters.


def pre_norm_block(x, part, placement, A):
    h = part["attention"](part["norm1"](x))
    if placement == "houlsby":
        h = h + A[0](h)
    x = x + h
    if "others" in part:
        x = x + part["others"](part["norm of others"](x))
    z = part["norm2"](x)
    h = part["feed_forward"](z)
    return (
        x + h + {"houlsby": lambda: A[1](h), "pfeiffer": lambda: A[0](h + x), "parallel": lambda: A[0](z)}[placement]()
    )


def post_norm_block(x, part, placement, A):
    h = part["attention"](x)
    if placement == "houlsby":
        h = h + A[0](h)
    x = part["norm1"](x + h)
    if "others" in part:
        x = part["norm of others"](x + part["others"](x))
    h = part["feed_forward"](x)
    if placement == "houlsby":
        h = h + A[1](h)
    elif placement == "pfeiffer":
        h = h + A[0](part["norm2"](h + x))
    else:
        h = h + A[0](x)
    return part["norm2"](x + h)


def llama_parts(block, model, x):
    positions = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    mlp = block.mlp
    return {
        "norm1": block.input_layernorm,
        "attention": lambda v: block.self_attn(v, position_embeddings=positions, attention_mask=None)[0],
        "norm2": block.post_attention_layernorm,
        "feed_forward": lambda v: mlp.down_proj(F.silu(mlp.gate_proj(v)) * mlp.up_proj(v)),
    }


def gpt2_parts(block, model, x):
    return {
        "norm1": block.ln_1,
        "attention": lambda v: block.attn(v)[0],
        "norm2": block.ln_2,
        "feed_forward": lambda v: block.mlp.c_proj(F.gelu(block.mlp.c_fc(v), approximate="tanh")),
    }


def bert_parts(block, model, x):
    return {
        "attention": lambda v: block.attention.output.dense(block.attention.self(v)[0]),
        "norm1": block.attention.output.LayerNorm,
        "feed_forward": lambda v: block.output.dense(F.gelu(block.intermediate.dense(v))),
        "norm2": block.output.LayerNorm,
    }


def distilbert_parts(block, model, x):
    return {
        "attention": lambda v: block.attention(v)[0],
        "norm1": block.sa_layer_norm,
        "feed_forward": lambda v: block.ffn.lin2(F.gelu(block.ffn.lin1(v))),
        "norm2": block.output_layer_norm,
    }


def t5_parts(block, model, x, memory=None):
    decoder, (attention, *other, forward) = memory is not None, block.layer
    first = (model.decoder if decoder else model.encoder).block[0].layer[0].SelfAttention
    bias = first.compute_bias(x.shape[1], x.shape[1]) + (causal(x) if decoder else 0)
    found = {
        "norm1": attention.layer_norm,
        "attention": lambda v: attention.SelfAttention(v, position_bias=bias)[0],
        "norm2": forward.layer_norm,
        "feed_forward": lambda v: forward.DenseReluDense.wo(F.relu(forward.DenseReluDense.wi(v))),
    }
    if other:
        found["norm of others"] = other[0].layer_norm
        found["others"] = lambda v: other[0].EncDecAttention(v, key_value_states=memory)[0]
    return found


def bart_parts(block, model, x, memory=None):
    mask = None if memory is None else causal(x)
    found = {
        "norm1": block.self_attn_layer_norm,
        "attention": lambda v: block.self_attn(v, attention_mask=mask)[0],
        "norm2": block.final_layer_norm,
        "feed_forward": lambda v: block.fc2(F.gelu(block.fc1(v))),
    }
    if memory is not None:
        found["norm of others"] = block.encoder_attn_layer_norm
        found["others"] = lambda v: block.encoder_attn(v, key_value_states=memory)[0]
    return found


def causal(x):
    return torch.full((1, 1, x.shape[1], x.shape[1]), -torch.inf).triu(1)


def reference(base, model, weights, ids, method, scale):
    """Logits (n, t, vocabulary) or (n, classes), from an untouched base and the adapters' weights.

    A T5 and a BART are given the same tokens on both sides.
    """
    act = ACTIVATIONS[method.nonlinearity]

    def function(a):
        D, b, U, c = a.down.weight, a.down.bias, a.up.weight, a.up.bias
        return lambda v: scale * (act(v @ D.T + b) @ U.T + c)

    functions = [function(a) for a in weights]
    each = len(functions) // LAYERS[base]
    if base in ("t5", "bart"):
        inner = getattr(model, "model", model)
        parts, block = (t5_parts, pre_norm_block) if base == "t5" else (bart_parts, post_norm_block)
        memory, place = None, 0
        for side in (inner.encoder, inner.decoder):
            x = side.embed_tokens(ids)
            if base == "bart":
                x = side.layernorm_embedding(x + side.embed_positions(ids))
            for layer in side.block if base == "t5" else side.layers:
                x = block(x, parts(layer, inner, x, memory), method.placement, functions[place : place + each])
                place += each
            memory = side.final_layer_norm(x) if base == "t5" else x
        return model.lm_head(memory * WIDTH**-0.5 if base == "t5" else memory)
    match base:
        case "llama":
            x, blocks, parts, block = model.model.embed_tokens(ids), model.model.layers, llama_parts, pre_norm_block
        case "gpt2":
            inner = model.transformer
            x = inner.wte(ids) + inner.wpe(torch.arange(ids.shape[1]))
            blocks, parts, block = inner.h, gpt2_parts, pre_norm_block
        case "bert":
            x, blocks = model.bert.embeddings(input_ids=ids), model.bert.encoder.layer
            parts, block = bert_parts, post_norm_block
        case _:
            x, blocks = model.distilbert.embeddings(ids), model.distilbert.transformer.layer
            parts, block = distilbert_parts, post_norm_block
    for index, layer in enumerate(blocks):
        x = block(x, parts(layer, model, x), method.placement, functions[index * each : (index + 1) * each])
    match base:
        case "llama":
            return model.lm_head(model.model.norm(x))
        case "gpt2":
            return model.lm_head(model.transformer.ln_f(x))
        case "bert":
            return model.classifier(torch.tanh(model.bert.pooler.dense(x[:, 0])))
        case _:
            return model.classifier(F.relu(model.pre_classifier(x[:, 0])))


def check_reference(base, spec, scale):
    model, plain = randomized(spec), load_base(spec)
    for head in models.new_heads(model):
        plain.get_submodule(head).load_state_dict(model.get_submodule(head).state_dict())
    ids = torch.randint(3, 1024, (3, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = reference(base, plain, adapters(model), ids, spec.method, scale)
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if base in ("t5", "bart") else {})
        got, untouched = model(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (got - untouched).abs().max() > 0.05  # else the comparison would show nothing


@pytest.mark.parametrize(("base", "placement"), product(BASES, PLACEMENTS))
def test_it_computes_what_the_papers_say(base, placement, spec_of):
    check_reference(base, spec_of(base, {"placement": placement}), scale=4.0 if placement == "parallel" else 1.0)


BLOCKS = {  # of each family: its blocks, norm, attention, norm and feed-forward, and whether these stand side by side
    "gpt_neox": ("gpt_neox.layers", "input_layernorm attention post_attention_layernorm mlp", True),
    "falcon": ("transformer.h", "input_layernorm self_attention input_layernorm mlp", True),
    "bloom": ("transformer.h", "input_layernorm self_attention post_attention_layernorm mlp", False),
    "opt": ("model.decoder.layers", "self_attn_layer_norm self_attn final_layer_norm fc1", False),
    "mixtral": ("model.layers", "input_layernorm self_attn post_attention_layernorm mlp", False),
    "qwen3-moe": ("model.layers", "input_layernorm self_attn post_attention_layernorm mlp", False),
    "modernbert": ("model.layers", "attn_norm attn mlp_norm mlp", False),
}


def block_of(plain, family, passed):
    """How a block computes, and its parts, of an untouched one whose attention is given what was `passed` beside its
    input."""
    norm1, attention, norm2, feed_forward = (plain.get_submodule(name) for name in BLOCKS[family][1].split())
    nothing = torch.zeros(1, 1, WIDTH // 2)  # of Bloom's attention and feed-forward, in which the residual is added

    args, kwargs = passed

    def attend(v):
        if "hidden_states" in kwargs:
            return attention(**kwargs | {"hidden_states": v})[0]
        return attention(v, *(nothing for _ in args[1:]), **kwargs)[0]

    def feed(v):
        if family == "opt":
            return plain.fc2(plain.activation_fn(feed_forward(v)))
        return feed_forward(v, nothing) if family == "bloom" else feed_forward(v)

    part = {"norm1": norm1, "attention": attend, "norm2": norm2, "feed_forward": feed}
    return side_by_side_block if BLOCKS[family][2] else pre_norm_block, part


def side_by_side_block(x, part, placement, A):
    h, z = part["attention"](part["norm1"](x)), part["norm2"](x)
    f = part["feed_forward"](z)
    if placement == "houlsby":
        return x + h + A[0](h) + f + A[1](f)
    return x + h + f + (A[0](x + h + f) if placement == "pfeiffer" else A[0](z))


@pytest.mark.parametrize(
    ("family", "placement"), [pair for pair in product(BLOCKS, PLACEMENTS) if pair != ("opt", "parallel")]
)
def test_a_block_of_another_kind_computes_what_the_papers_say(family, placement):
    torch.manual_seed(0)
    plain = families.make(family, "cpu").eval()
    for parameter in plain.parameters():
        parameter.data *= 5 if parameter.ndim > 1 else 1
    spec = make_spec(method={"name": "adapter", "placement": placement, "reduction": 8})
    model, seen = spec.method.attach(copy.deepcopy(plain), spec), {}
    for adapter in adapters(model):
        torch.nn.init.normal_(adapter.up.weight, generator=torch.Generator().manual_seed(1))
    blocks, names, _ = BLOCKS[family]
    block, untouched = (each.get_submodule(f"{blocks}.1") for each in (model, plain))
    block.register_forward_hook(
        lambda _, args, out: seen.update(x=args[0], out=out[0] if isinstance(out, tuple) else out)
    )
    block.get_submodule(names.split()[1]).register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(passed=(args, kwargs)), with_kwargs=True
    )
    scale = 4.0 if placement == "parallel" else 1.0
    model.config.use_cache = False
    with torch.no_grad():
        model(input_ids=torch.randint(3, 1000, (2, 9), generator=torch.Generator().manual_seed(2)))
        function, part = block_of(untouched, family, seen["passed"])
        A = [lambda v, a=a: scale * a(v) for a in adapters(block)]
        want, without = (function(seen["x"], part, placement, each) for each in (A, [lambda v: 0 * v] * 2))
    torch.testing.assert_close(seen["out"], want, atol=1e-4, rtol=1e-4)
    assert (want - without).abs().max() > 0.05


def test_placements_that_a_kind_of_block_has_not_are_told():
    spec = make_spec(method={"name": "adapter", "placement": "parallel"})
    with pytest.raises(InputError, match=r'placement = "parallel": .*OPTForCausalLM.*Choices: houlsby, pfeiffer'):
        spec.method.attach(families.make("opt"), spec)
    norms_last = families.make("opt")
    for block in norms_last.model.decoder.layers:
        block.do_layer_norm_before = False  # as in OPT-350m: its modules are called as BART's are
    with pytest.raises(InputError, match="no way that is known"):
        spec.method.attach(norms_last, spec)


@pytest.mark.parametrize("nonlinearity", ACTIVATIONS)
def test_nonlinearity_and_scale(nonlinearity, spec_of):
    spec = spec_of("llama", {"nonlinearity": nonlinearity, "scale": 2.5})
    check_reference("llama", spec, scale=2.5)
    with torch.no_grad():
        adapter, v = adapters(randomized(spec))[0], torch.linspace(-4, 4, 100)
        torch.testing.assert_close(adapter.nonlinearity(v), ACTIVATIONS[nonlinearity](v))


@pytest.mark.parametrize(("base", "placement"), product([*BASES, "roberta"], PLACEMENTS))
def test_it_starts_as_the_base(base, placement, spec_of):
    spec = spec_of(base, {"placement": placement})
    assert difference(attach(spec), load_base(spec), spec) == 0


@pytest.mark.parametrize(("base", "placement"), product([*BASES, "roberta"], PLACEMENTS))
def test_it_trains_the_parameters_that_the_papers_count(base, placement, spec_of):
    """2 m d + d + m for each adapter: section 2.1 of Houlsby et al. 2019."""
    each = 2 * WIDTH * BOTTLENECK + WIDTH + BOTTLENECK
    spec = spec_of(base, {"placement": placement})
    got = sum(p.numel() for p in attach(spec).parameters() if p.requires_grad)
    assert got == each * LAYERS[base] * (2 if placement == "houlsby" else 1) + HEAD.get(base, 0)
    assert plan.count(spec).num_trainable == got  # without weights


@pytest.mark.parametrize(("base", "placement"), product(BASES, PLACEMENTS))
def test_the_loss_falls_and_the_base_stays_as_it_is(base, placement, spec_of):
    spec = spec_of(base, {"placement": placement})
    model, plain = attach(spec), load_base(spec)
    losses = train(spec, model, steps=12)
    assert losses[-1] < losses[0]
    heads = tuple(models.new_heads(plain))
    trained = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if not (heads and name.startswith(heads)):
            assert torch.equal(trained[name], parameter), name
    assert all(torch.count_nonzero(a.up.weight) and torch.count_nonzero(a.down.bias) for a in adapters(model))


def test_only_the_blocks_that_were_asked_for(spec_of):
    spec = spec_of("llama", {"layers": "1", "placement": "houlsby"})
    names = [name for name, _ in attach(spec).named_modules() if name.endswith("bottleneck")]
    assert names == ["model.layers.1.self_attn.o_proj.bottleneck", "model.layers.1.mlp.down_proj.bottleneck"]


def test_the_start_is_random_and_of_the_spread_of_bert(spec_of):
    spec = spec_of("llama", {"reduction": 1})
    (first, second), (third, _) = adapters(attach(spec)), adapters(spec.method.attach(load_base(spec), spec))
    assert float(first.down.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(first.down.weight, second.down.weight)
    assert torch.equal(first.down.weight, third.down.weight)  # by the global generator


def test_dropout_is_of_what_the_adapter_adds(spec_of):
    spec = spec_of("llama", {"dropout": 0.5})
    adapter = adapters(randomized(spec))[0]
    x = torch.randn(200, WIDTH)
    with torch.no_grad():
        whole, dropped = adapter.eval()(x), adapter.train()(x)
    kept = dropped != 0
    assert 0.45 < float(kept.float().mean()) < 0.55
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])


@pytest.mark.parametrize(("base", "keep"), [*product(BASES, ["updates"]), ("bert", "svd:1"), ("llama", "svd:1")])
def test_saved_and_loaded_it_gives_the_same_logits(base, keep, spec_of, tmp_path):
    spec = spec_of(base, {"placement": "houlsby"}, keep=keep)
    model = attach(spec)
    train(spec, model, steps=4)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        spec.method.save(model, lambda: load_base(spec), tmp_path / folder, keep)
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    deltas = {"delta.safetensors" if keep == "updates" else "svd.safetensors"} if base in HEAD else set()
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"} | deltas
    loaded = spec.method.load(load_base(spec), tmp_path / "one", spec).eval()
    assert difference(loaded, model, spec) == 0
    assert difference(loaded, load_base(spec), spec) > 1e-4


def test_the_update_is_that_of_the_new_head_alone(spec_of, tmp_path):
    spec = spec_of("bert")
    model = attach(spec)
    train(spec, model, steps=4)
    spec.method.save(model, lambda: load_base(spec), tmp_path, "updates")
    updates = {update.parameter: update.dense() for update in read_updates(tmp_path)}
    assert set(updates) == {"classifier.weight", "classifier.bias"}
    change = model.classifier.weight.detach() - load_base(spec).classifier.weight.detach()
    assert change.abs().max() > 1e-4
    torch.testing.assert_close(updates["classifier.weight"], change, atol=0, rtol=0)
    language_model = spec_of("llama")
    assert not list(language_model.method.updates(attach(language_model), lambda: pytest.fail("needs no base")))


def test_nothing_of_it_can_be_merged(spec_of):
    spec = spec_of("llama")
    assert not spec.method.has_update
    assert spec.method.merge(attach(spec)) is None


def test_a_checkpoint_gives_the_same_model_again(spec_of):
    spec = spec_of("bert", {"placement": "parallel"})
    model, other = randomized(spec), attach(spec)
    assert difference(model, other, spec) > 0.05
    spec.method.restore(other, spec.method.trained_state(model))
    assert difference(model, other, spec) == 0


@pytest.mark.parametrize(("quantization", "placement"), [("nf4", p) for p in PLACEMENTS] + [("int8", "houlsby")])
def test_on_a_quantized_base_the_adapters_alone_train(quantization, placement, spec_of, tmp_path):
    spec = spec_of("llama", {"placement": placement}, quantization=quantization)
    model, plain = attach(spec), load_base(spec)
    assert difference(model, plain, spec) == 0
    losses = train(spec, model, steps=12)
    assert losses[-1] < losses[0]
    trained = dict(model.named_parameters())
    assert {name for name, p in trained.items() if p.requires_grad} == set(trained) - set(
        dict(plain.named_parameters())
    )
    assert all(torch.equal(trained[name], parameter) for name, parameter in plain.named_parameters())
    spec.method.save(model, lambda: load_base(spec), tmp_path, "updates")
    assert difference(spec.method.load(load_base(spec), tmp_path, spec).eval(), model, spec) == 0


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_on_a_bfloat16_base_with_and_without_autocast(placement, adapter_dtype, spec_of):
    spec = spec_of("llama", {"placement": placement, "adapter_dtype": adapter_dtype}, dtype="bfloat16")
    model = randomized(spec)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {getattr(torch, adapter_dtype)}
    with torch.no_grad():
        plain = forward(model, a_batch(spec))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = forward(model, a_batch(spec))
        exact = forward(model.float(), a_batch(spec))
    assert plain.dtype == mixed.dtype == torch.bfloat16
    for rounded in (plain, mixed):
        assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("base", "placement"), product(BASES, PLACEMENTS))
def test_gradient_checkpointing_gives_the_same_gradients(base, placement, spec_of):
    spec = spec_of(base, {"placement": placement})

    def gradients(checkpointing):
        model = randomized(spec).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls = []
        adapters(model)[0].register_forward_pre_hook(lambda *_: calls.append(1))
        batch = a_batch(spec)
        torch.manual_seed(0)  # of dropout
        spec.task.loss(forward(model, batch), batch).backward()
        assert len(calls) == 1 + checkpointing  # computed again in the backward pass
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    want, got = gradients(False), gradients(True)
    for name, gradient in want.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("base", "placement"), product(["llama", "gpt2"], PLACEMENTS))
def test_generate_takes_the_largest_logit_of_forward(base, placement, spec_of):
    model = randomized(spec_of(base, {"placement": placement}))
    ids = torch.randint(3, 1024, (2, 5), generator=torch.Generator().manual_seed(3))
    got = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=True, eos_token_id=None
    )
    want = ids
    with torch.no_grad():
        for _ in range(6):
            want = torch.cat([want, model(input_ids=want).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("base", "placement"), product(["llama", "bert"], PLACEMENTS))
def test_a_copy_has_adapters_of_its_own(base, placement, spec_of):
    spec = spec_of(base, {"placement": placement})
    model = randomized(spec)
    twin = copy.deepcopy(model)
    assert difference(model, twin, spec) == 0
    with torch.no_grad():
        before = forward(model, a_batch(spec))
        for adapter in adapters(twin):
            adapter.up.bias += 1 + torch.arange(WIDTH) % 3
        assert torch.equal(forward(model, a_batch(spec)), before)
    assert difference(model, twin, spec) > 1e-3
    train(spec, twin, steps=1)
    assert all(p.grad is None for p in model.parameters())


def test_a_block_that_gives_several_outputs_keeps_the_others(spec_of):
    """As GPT-2's did in earlier versions of transformers."""
    from lorabench.methods.adapter import _extended

    class Block(torch.nn.Module):
        def forward(self, x, times=1):
            return times * x, "cache"

    block = Block()
    block.bottleneck = adapters(randomized(spec_of("llama")))[0]
    block.__class__ = _extended(Block, 2.0)
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        output, cache = block(x, times=3)
        torch.testing.assert_close(output, 3 * x + 2 * block.bottleneck(3 * x))
    assert cache == "cache"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"reduction": 0}, ["method.reduction = 0"]),
        ({"placement": "pfeifer"}, ["method.placement", "Did you mean 'pfeiffer'?"]),
        ({"nonlinearity": "swish"}, ["method.nonlinearity", "relu, gelu, silu"]),
        ({"scale": 0.0}, ["method.scale"]),
        ({"dropout": 1.0}, ["method.dropout"]),
        ({"layers": "0-"}, ['method.layers = "0-"']),
    ],
)
def test_bad_fields_are_told_when_the_spec_is_read(method, words, spec_of):
    with pytest.raises(InputError) as error:
        spec_of("llama", method)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("method", "words"),
    [({"reduction": 65}, ["method.reduction = 65", "at most 64"]), ({"layers": "1,7"}, ['method.layers = "1,7"', "7"])],
)
def test_what_does_not_fit_the_model(method, words, spec_of):
    with pytest.raises(InputError) as error:
        attach(spec_of("llama", method))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("family", ["mamba", "qwen3-next"])
def test_an_architecture_that_is_not_known(family, spec_of):
    model, spec = families.make(family), spec_of("llama")
    with pytest.raises(InputError) as error:
        spec.method.attach(model, spec)
    words = [type(model).__name__, "Llama", "Mixtral", "GPT-2", "BERT", "DistilBERT"]
    assert all(word in str(error.value) for word in words)


def test_a_folder_that_is_not_of_this_method_and_base(spec_of, tmp_path):
    spec = spec_of("llama")
    spec.method.save(attach(spec), lambda: load_base(spec), tmp_path, "updates")

    def refused(spec):
        with pytest.raises(InputError) as error:
            spec.method.load(load_base(spec), tmp_path, spec)
        return str(error.value)

    assert "reduction = 8 and not 4" in refused(spec_of("llama", {"reduction": 4}))
    assert "adapter_model.safetensors: does not fit" in refused(spec_of("gpt2"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    assert "peft_type" in refused(spec)
    (tmp_path / "adapter_config.json").unlink()
    assert "adapter_config.json" in refused(spec)
