"""What runs on which architecture: the table of docs/methods.md, cell by cell, and a few steps of training on each.

Every cell of the table is a sweep's run as `plan` sees it: the method is attached to the model without weights, and on
a small random one computed, saved and read. `TRAINED` take three steps on each, and some of them all the way of a run.
"""

from __future__ import annotations

import copy
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as t

from lorabench.config.decode import InputError
from lorabench.data.dataset import BUILTIN
from lorabench.launch import plan
from lorabench.models import base_model as models
from lorabench.models import targets, weights
from lorabench.models.fused import fused_parts
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.examples import collate, prepare
from lorabench.training.execute import Options, execute
from lorabench.training.passes import forward
from lorabench.training.state import make_optimizer
from lorabench.updates.formats import read_updates
from tests import families
from tests.conftest import make_spec

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
NAMES = {
    "Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma": "gemma", "Mistral": "mistral", "Phi-3": "phi3",
    "GPT-2": "gpt2", "GPT-NeoX": "gpt_neox", "OPT": "opt", "Falcon": "falcon", "Bloom": "bloom", "Mixtral": "mixtral",
    "Qwen3-MoE": "qwen3-moe", "OLMoE": "olmoe", "BERT": "bert", "RoBERTa": "roberta", "DeBERTa-v2": "deberta-v2",
    "ModernBERT": "modernbert", "DistilBERT": "distilbert", "T5": "t5", "BART": "bart",
    "ViT": "vit", "DeiT": "deit", "DINOv2": "dinov2", "Swin": "swin", "ConvNeXt": "convnext",
}  # fmt: skip
"""As the page calls them."""
FULL = {"name": "full"}
LORA = {"name": "lora", "rank": 2}
COLUMNS: dict[str, dict[str, dict]] = {  # by the heads of the table's columns
    "`query`, `query-value`": {p: LORA | {"targets": p} for p in ("query", "query-value")},
    "other presets": {p: LORA | {"targets": p} for p in ("attention", "mlp", "key-value-down", "all-linear")},
    "`ia3`": {"ia3": {"name": "ia3"}},
    "`adapter`": {p: {"name": "adapter", "placement": p, "reduction": 8} for p in ("houlsby", "pfeiffer", "parallel")},
    "`prefix`": {"prefix": {"name": "prefix", "num_tokens": 4}},
    "`prompt`, `ptuning`": {name: {"name": name, "num_tokens": 4} for name in ("prompt", "ptuning")},
    "`bitfit`": {"bitfit": {"name": "bitfit"}},
    "`full`": {"full": FULL},
}
TRAINED = {
    **COLUMNS["`query`, `query-value`"],
    **COLUMNS["other presets"],
    "full": FULL,
    "adapter": COLUMNS["`adapter`"]["pfeiffer"],
    "prefix": COLUMNS["`prefix`"]["prefix"],
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def spec_of(tmp_path_factory, labelled):
    """`spec_of(family, method)`: three steps on a random model of the family, whose folder is made once; an InputError
    where no spec says so."""

    @cache
    def folder(family):
        path = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        model = families.make(family, "cpu")
        (model.base_model if family in families.CLASSIFIERS else model).save_pretrained(path)
        if family in families.VISION:
            shutil.copy(BUILTIN / "tiny-vit" / "preprocessor_config.json", path)
        else:
            t.AutoTokenizer.from_pretrained(BUILTIN / "tiny-llama").save_pretrained(path)
        return str(path)

    def make(family, method):
        task = {"name": "text", "data": "builtin:python-code", "max_train": 16, "max_eval": 4}
        if family in ("t5", "bart"):
            task = task | {"name": "seq2seq", "source": "{source}", "target": "{text}"}
        elif family in families.CLASSIFIERS:
            task = {"name": "classification", "data": labelled, "max_train": 16, "max_eval": 4}
        elif family in families.VISION:
            task = {"name": "image_classification", "data": "builtin:digits-turned", "max_train": 16, "max_eval": 4}
        try:
            return make_spec(model=folder(family), method=method, task=task, steps=3, seq_len=24, lr=0.05)
        except InputError as error:
            return error

    return make


def refused(spec):
    """Why `plan` refuses it; None where it does not."""
    try:
        if isinstance(spec, InputError):
            raise spec
        plan.count(spec)
    except InputError as error:
        assert len(error.problems) == 1 and re.match(r"method\.|model = ", error.problems[0]), error.problems
        return error.problems[0]
    return None


def cell(variants):
    """`yes`, or those that are not refused; `–` where all are."""
    runs = [name for name, reason in variants.items() if reason is None]
    return "yes" if len(runs) == len(variants) else ", ".join(runs) or "–"


def readme():
    """The heads of the table's columns; by the page's name of an architecture what is fused there, and the cells."""
    table = PAGE.read_text().partition("\n| architecture |")[2].partition("\n\n")[0]
    heads, _, *rows = [[part.strip() for part in line.strip("| ").split("|")] for line in table.splitlines()]
    named = {name: (fused, cells) for names, fused, *cells in rows for name in names.split(", ")}
    return heads[1:], named


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_says_what_runs(name, spec_of):
    found = {head: {variant: refused(spec_of(NAMES[name], method)) for variant, method in variants.items()}
             for head, variants in COLUMNS.items()}  # fmt: skip
    heads, rows = readme()
    assert heads == list(COLUMNS)
    assert rows[name][1] == [cell(variants) for variants in found.values()], found


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_says_what_is_analyzed_by_part(name):
    kinds: dict[str, list[str]] = {}
    for parameter, parts in fused_parts(families.make(NAMES[name], "cpu")).items():
        kinds[re.sub(r"\[.*|\.weight$", "", parameter).rpartition(".")[2]] = list(parts)
    told = "; ".join(f"`{leaf}`: {', '.join(parts)}" for leaf, parts in kinds.items())
    assert readme()[1][name][0] == (told or "–")


@pytest.mark.parametrize(
    ("name", "column", "variant", "words"),
    [
        ("Phi-3", "`query`, `query-value`", "query", r'method\.targets = "query": .*\(qkv_proj\), for attention'),
        ("OLMoE", "`ia3`", "ia3", r'method\.name = "ia3": .*OlmoeForCausalLM ends in stacked experts.*experts\.down'),
        ("OPT", "`adapter`", "parallel", r'method\.placement = "parallel": .*Choices: houlsby, pfeiffer'),
        ("DistilBERT", "`prefix`", "prefix", r'method\.name = "prefix": .*does not support past key values'),
        ("Mamba", "`prefix`", "prefix", r'method\.name = "prefix": PEFT refuses it .*num_attention_heads'),
        ("Llama", "`bitfit`", "bitfit", r'method\.name = "bitfit": LlamaForCausalLM has no biases'),
    ],
)
def test_what_is_refused_is_told_with_the_reason(name, column, variant, words, spec_of):
    assert re.search(words, refused(spec_of(NAMES.get(name, name.lower()), COLUMNS[column][variant])) or "")


NARROW = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
"""As in OPT 350m."""


@pytest.mark.parametrize(
    ("family", "changes", "method", "count"),
    [
        ("falcon", {}, "prefix", 4 * 2 * 2 * 8),  # of its heads of width 8 all share one key and value
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "prefix", 4 * 2 * 2 * 32),
        ("opt", NARROW, "prompt", 4 * 16),
        ("mamba", {}, "prompt", 4 * 32),  # which has no heads
        ("distilbert", {}, "prompt", 4 * 32 + (32 + 1) * 32 + (32 + 1) * 2),  # and its new head
    ],
)
def test_soft_prompts_are_as_wide_as_what_they_stand_in_front_of(family, changes, method, count):
    torch.manual_seed(0)
    auto = t.AutoModelForSequenceClassification if family in families.CLASSIFIERS else t.AutoModelForCausalLM
    model = auto.from_config(families.CONFIGS[family](**changes)).eval()
    spec = make_spec(method={"name": method, "num_tokens": 4})
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits
        tuned = spec.method.attach(model, spec)
        found = forward(tuned.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == count
    assert found.shape == want.shape and (found - want).abs().max() > 1e-4


def trained(spec, base, examples):
    """The base with the run's method on it after three steps on one batch, and that batch."""
    torch.manual_seed(0)
    model = spec.method.attach(copy.deepcopy(base), spec).train()
    batch = collate(examples.splits["train"][:4], examples.padding, CPU)
    optimizer = make_optimizer(spec, model)
    for _ in range(3):
        optimizer.zero_grad()
        (spec.task.loss(forward(model, batch), batch) / spec.task.count(batch)).backward()
        optimizer.step()
    return model.eval(), batch


def add(model, updates):
    for update in updates:
        weights.add_update(model, update)
    return model


@pytest.mark.parametrize("family", NAMES.values())
def test_what_is_saved_is_what_three_steps_have_changed(family, spec_of, tmp_path):
    """With what is loaded again, and with W0 + ΔW, the model computes what the trained one does; LoRA is on the layers
    that its targets are, and its ΔW are what PEFT merges."""
    more = {"convolutions": LORA | {"targets": "convolutions"}} if family in families.VISION else {}
    specs = {kind: spec_of(family, method) for kind, method in (TRAINED | more).items()}
    examples = prepare(specs["full"])
    base = models.load_base(specs["full"], CPU, examples.model_options).eval()
    heads = tuple(models.new_heads(base))
    for kind, spec in specs.items():
        if refused(spec):
            continue
        model, batch = trained(spec, base, examples)
        (folder := tmp_path / kind).mkdir()
        spec.method.save(model, lambda: base, folder, "updates")
        updates = {update.parameter: update for update in read_updates(folder)}
        with torch.no_grad():
            want, untouched = forward(model, batch), forward(base, batch)
            assert (want - untouched).abs().max() > 1e-4  # ten times what they may differ by below
            loaded = spec.method.load(copy.deepcopy(base), folder, spec).eval()
            torch.testing.assert_close(forward(loaded, batch), want, atol=1e-5, rtol=1e-4)
            if spec.method.has_update:
                got = forward(add(copy.deepcopy(base), updates.values()), batch)
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        if spec.method.name == "lora":
            found = targets.find(base, spec.method.targets)
            merged = weights.weight_changes(loaded.merge_and_unload(), base)
            changed = {update.parameter: update.B for update in merged if update.B.norm() > 1e-5}
            assert changed.keys() == updates.keys()
            for parameter, delta in changed.items():
                torch.testing.assert_close(updates[parameter].dense(), delta, atol=1e-6, rtol=1e-3)
            names = {
                re.sub(r"(\[\d+\])?\.weight$", "", name) for name in updates if not (heads and name.startswith(heads))
            }
            layers = *found.layers, *found.stacked, *found.convolutions
            assert names == {name.removesuffix(".weight") for name in layers}


@pytest.mark.parametrize("kind", ["all-linear", "full"])
@pytest.mark.parametrize("family", ["falcon", "olmoe", "modernbert"])
def test_of_a_whole_run_the_base_with_its_update_has_the_loss_that_was_measured(family, kind, spec_of, tmp_path):
    spec, store = spec_of(family, TRAINED[kind]), Store(tmp_path)
    assert execute(spec, store, Options(device="cpu", log_to_file=False)) == Status.DONE, store.read(spec.id).error
    measures, examples = store.read(spec.id).measures, prepare(spec)
    torch.manual_seed(spec.seed)
    base = models.load_base(spec, CPU, examples.model_options).eval()
    batch = collate(examples.splits["validation"], examples.padding, CPU)
    plus = add(copy.deepcopy(base), read_updates(store.folder(spec.id) / "updates"))
    with torch.no_grad():
        before, after = (
            float(spec.task.loss(forward(model, batch), batch) / spec.task.count(batch)) for model in (base, plus)
        )
    assert before == pytest.approx(measures["base_valid_loss"], abs=5e-6)
    assert after == pytest.approx(measures["valid_loss"], abs=5e-6) and abs(after - before) > 1e-4
