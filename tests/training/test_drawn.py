"""What a base's files lack is drawn at random: it is saved, so that what was learned does not depend on a seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorabench.config import plugins
from lorabench.config.decode import InputError, encode
from lorabench.launch import plan as plans
from lorabench.models import base_model as models
from lorabench.store.record import Status
from lorabench.store.store import Store
from tests import families
from tests.conftest import make_spec

CPU = torch.device("cpu")
TEXT, CLASSES = {"name": "text"}, {"name": "classification", "data": "x"}
AUTO = {"text": t.AutoModelForCausalLM, "classification": t.AutoModelForSequenceClassification}
BODIES = ["bert", "roberta", "deberta-v2", "modernbert", "distilbert", "t5", "bart", "llama", "gpt2", "opt", "mixtral"]
PAIRS = [(family, CLASSES) for family in BODIES] + [(f, TEXT) for f in ("llama", "gpt2", "mamba", "qwen3-moe", "phi3")]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder of a family's model: its body alone, or with a masked language model's head."""
    folders = {}

    def make(family, head=t.AutoModel):
        if (family, head) not in folders:
            folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(3)
            model = head.from_config(families.CONFIGS[family]())
            model.save_pretrained(folder)
            t.AutoTokenizer.from_pretrained(models.BUILTIN / "tiny-llama").save_pretrained(folder)
            folders[family, head] = str(folder)
        return folders[family, head]

    return make


def tokens():
    ids = torch.arange(5, 29).reshape(2, 12)
    ids[:, -1] = 1  # a T5 classifies by the end of the sequence
    return ids


def loss(model, task):
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens()).logits[:, -12:]  # a soft prompt's own positions come first
    if task == CLASSES:
        return torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2]))
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


def learn(spec, options):
    """The tuned model, whose trained parameters have moved."""
    torch.manual_seed(spec.seed)
    model = spec.method.attach(models.load_base(spec, CPU, options), spec)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def head_for(family, task):
    masked = family in ("bert", "roberta", "deberta-v2", "modernbert", "distilbert")
    return t.AutoModelForMaskedLM if masked and task == CLASSES else t.AutoModel


@pytest.mark.parametrize(
    ("family", "task"), PAIRS, ids=lambda value: value if isinstance(value, str) else value["name"]
)
def test_peft_loads_what_was_recorded_under_another_seed(family, task, checkpoint, tmp_path):
    options = {"num_labels": 3} if task == CLASSES else {}
    spec = make_spec(model=checkpoint(family, head_for(family, task)), task=task, method={"name": "lora", "rank": 1})
    model = learn(spec, options)
    want = loss(model, task)
    spec.method.save(model, lambda: models.load_base(spec, CPU, options), tmp_path, "updates")
    torch.manual_seed(4)
    base = AUTO[task["name"]].from_pretrained(spec.model, dtype=torch.float32, **options)
    base.config.pad_token_id = 2
    torch.testing.assert_close(loss(PeftModel.from_pretrained(base, tmp_path), task), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("task", [CLASSES, TEXT], ids=["classification", "text"])
@pytest.mark.parametrize("name", plugins.names("methods"))
def test_every_method_loads_what_it_saved_under_another_seed(name, task, checkpoint, tmp_path):
    family = "bert" if task == CLASSES else "mistral"
    options = {"num_labels": 3} if task == CLASSES else {}
    method = encode(plugins.example("methods", name))
    spec = make_spec(model=checkpoint(family, head_for(family, task)), task=task, method=method)
    if (name, family) == ("bitfit", "mistral"):
        return
    model = learn(spec, options)
    want = loss(model, task)
    spec.method.save(model, lambda: make_base(spec, options), tmp_path, "updates")
    torch.manual_seed(4)
    loaded = spec.method.load(models.load_base(spec, CPU, options), tmp_path, spec)
    torch.testing.assert_close(loss(loaded, task), want, atol=1e-5, rtol=1e-5)
    trained = {update.parameter for update in spec.method.updates(model, lambda: make_base(spec, options))}
    untouched = {"bert.pooler.dense.weight", "lm_head.weight"}
    assert name in ("full", "head") or not trained & untouched


def make_base(spec, options):
    torch.manual_seed(spec.seed)
    return models.load_base(spec, CPU, options)


def test_what_is_saved_and_not_trained_counts_as_not_trained(checkpoint):
    spec = make_spec(model=checkpoint("bert", t.AutoModelForMaskedLM), task=CLASSES)
    model = learn(spec, {"num_labels": 3})
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and not any("pooler" in name for name in names)


def without(folder, target, lacks):
    """A copy of a checkpoint without the tensors of which `lacks` says so."""
    for file in Path(folder).iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(Path(folder) / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not lacks(name)}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def test_a_base_of_which_most_is_missing_is_refused(checkpoint, tmp_path):
    folder = without(checkpoint("llama"), tmp_path, lambda name: False)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"net.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spec = make_spec(model=folder)
    for refused in (lambda: plans.count(spec), lambda: models.load_base(spec, CPU, {})):
        with pytest.raises(
            InputError, match=r"files lack \d+ of the 21 parameters of LlamaFor.*what they hold.*\"net\."
        ):
            refused()


def test_a_base_of_which_some_is_missing_is_remarked_on(checkpoint):
    (note,) = plans.notes([make_spec(model=checkpoint("llama"))])
    assert "base: random, for the model's files lack it: lm_head" in note


def test_a_target_that_is_itself_random_is_refused(checkpoint, tmp_path):
    folder = without(checkpoint("llama"), tmp_path, lambda name: name.endswith("1.mlp.up_proj.weight"))
    with pytest.raises(
        InputError, match=r"lack the weights of model\.layers\.1\.mlp\.up_proj, which .*lora.* is put on"
    ):
        plans.count(make_spec(model=folder))
    plans.count(make_spec(model=folder, method={"name": "lora", "targets": "attention"}))


def test_a_head_of_another_size_is_a_new_one(tmp_path):
    torch.manual_seed(0)
    t.AutoModelForSequenceClassification.from_config(families.CONFIGS["bert"](num_labels=3)).save_pretrained(tmp_path)
    t.AutoTokenizer.from_pretrained(models.BUILTIN / "tiny-llama").save_pretrained(tmp_path)
    spec = make_spec(model=str(tmp_path), task=CLASSES)
    model = models.load_base(spec, CPU, {"num_labels": 2})
    assert model.classifier.weight.shape == (2, 32) and set(model.drawn) == {"classifier.weight", "classifier.bias"}
    config = families.CONFIGS["bert"](intermediate_size=48)
    config.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"files hold bert\.\S+ as \(64, 32\), and its config\.json asks for \(48, 32\)|as"
    ):
        models.load_base(spec, CPU, {"num_labels": 2})


def test_a_save_that_fails_keeps_what_was_computed(tmp_path, monkeypatch):
    from lorabench.training import execute, run

    spec, store = make_spec(steps=2), Store(tmp_path)
    real = run.write_update

    def broken(*arguments):
        raise AttributeError("'Experts' object has no attribute 'weight'")

    monkeypatch.setattr(run, "write_update", broken)
    assert execute.execute(spec, store, execute.Options(log_to_file=False)) == Status.FAILED
    assert run.checkpoint_file(store.folder(spec.id)).exists()
    monkeypatch.setattr(run, "write_update", real)
    assert execute.execute(spec, store, execute.Options(log_to_file=False)) == Status.DONE
    record = store.read(spec.id)
    assert record.resumed_from_step == spec.steps
    other = Store(tmp_path / "other")
    execute.execute(spec, other, execute.Options(log_to_file=False))
    same = other.read(spec.id)
    for key in ("valid_loss", "base_valid_loss", "train_loss"):
        assert record.measures[key] == same.measures[key]
    assert record.files == same.files
    log = [
        (folder / "steps.jsonl").read_text().count('"step"')
        for folder in (store.folder(spec.id), other.folder(spec.id))
    ]
    assert log[0] == log[1]
