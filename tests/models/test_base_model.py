"""Base models: from the Hub's cache, from folders, with their limits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lorabench.config.decode import InputError
from lorabench.data import dataset as data_module
from lorabench.models import base_model as models
from lorabench.store.record import Status
from lorabench.store.store import Store
from tests.conftest import make_spec

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def test_a_hub_model_is_loaded_and_its_commit_recorded(tmp_path):
    """The Hub's cache is laid out as a download would, so that the Hub's own code path runs without a network."""
    repository = tmp_path / "hub" / "models--acme--tiny"
    shutil.copytree(models.BUILTIN / "tiny-llama", repository / "snapshots" / COMMIT)
    shutil.copytree(models.BUILTIN / "tiny-llama", repository / "snapshots" / OTHER)
    (repository / "snapshots" / OTHER / "model.safetensors").write_bytes(b"not this one")
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(COMMIT)
    (repository / "refs" / "main").write_text(OTHER)
    sweep = tmp_path / "hub.toml"
    sweep.write_text(
        'base = { model = "acme/tiny", revision = "v2", task.name = "text", task.data = "builtin:python-code", '
        "task.max_train = 8, task.max_eval = 2, "
        "seq_len = 32, steps = 2, serving = false }\n"
        'grid = [{ method.name = "lora" }]\n'
    )
    command = [sys.executable, "-m", "lorabench", "run", str(sweep), "--results", str(tmp_path / "results")]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    (state,) = Store(tmp_path / "results").states()
    assert (done.returncode, state.status) == (0, Status.DONE), (done.stderr, state.error)
    assert state.record.environment["model_commit"] == COMMIT
    config = json.loads((tmp_path / "results" / "runs" / state.run_id / "updates" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/tiny"


def test_a_hub_data_set_is_read_by_its_splits(monkeypatch):
    import datasets

    rows = {"text": [f"row {i}" for i in range(8)], "label": [i % 2 for i in range(8)]}
    hub = datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name in ("train", "dev", "unsupervised")})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or hub)
    data = data_module.read_data("acme/films:small", revision="v2")
    assert asked == [(("acme/films", "small"), {"revision": "v2"})]
    assert data.splits["train"] == data.splits["validation"] == hub["train"].to_list()
    assert data.splits["test"] == []


def test_a_hub_data_set_that_is_not_there_is_one_clear_line(monkeypatch):
    import datasets

    def missing(*_, **__):
        raise ConnectionError("Couldn't reach 'acme/none' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(InputError, match=r"acme/none.*neither a local path nor a Hub data set"):
        data_module.read_data("acme/none")


@pytest.mark.parametrize(("base", "longest"), [("llama", 128), ("gpt2", 128), ("bert", 128), ("roberta", 128)])
def test_the_longest_input_is_what_the_model_takes(base, longest, tiny_bases):
    task = {"name": "classification", "data": "x"} if "bert" in base else {"name": "text"}
    spec = make_spec(model=tiny_bases[base], task=task)
    model = models.load_base(spec, torch.device("cpu"), {})
    assert models.max_length(model) == longest
    with torch.no_grad():
        model(input_ids=torch.full((1, longest), 7))
        if base != "llama":  # rotary positions have no end
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, longest + 1), 7))


def test_a_frozen_base_is_in_the_spec_s_dtype_and_a_trained_one_in_float32():
    for method, want in (("lora", torch.bfloat16), ("full", torch.float32)):
        spec = make_spec(method={"name": method}, dtype="bfloat16")
        model = models.load_base(spec, torch.device("cpu"), {})
        assert {p.dtype for p in model.parameters()} == {want}


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"has neither config\.json nor model_index\.json"):
        models.resolve(str(tmp_path))


@pytest.mark.parametrize("of_torch", [False, True])
def test_a_torn_file_of_weights_is_told(tmp_path, of_torch):
    """As a broken download leaves it: before anything is computed, and with its name."""
    model = shutil.copytree(models.resolve("builtin:tiny-llama"), tmp_path / "model")
    file = model / "model.safetensors"
    if of_torch:
        tensors = load_file(file)
        file.unlink()
        file = model / "pytorch_model.bin"
        torch.save(tensors, file)
    os.truncate(file, file.stat().st_size // 2)
    message = r"model = .*: its \*\.bin does not load" if of_torch else r"model\.safetensors: not a whole safetensors"
    spec = make_spec(model=str(model))
    for load in (lambda: models.from_files(spec, {}), lambda: models.load_base(spec, torch.device("cpu"), {})):
        with pytest.raises(InputError, match=message):
            load()


def test_a_classifier_finds_its_padding(tmp_path):
    """Whatever the config says: the logits of a text do not depend on what it is padded beside."""
    folder = tmp_path / "model"
    shutil.copytree(models.BUILTIN / "tiny-llama", folder)
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": 5}
    (folder / "config.json").write_text(json.dumps(config))
    spec = make_spec(model=str(folder), task={"name": "classification", "data": "x"})
    model = models.load_base(spec, torch.device("cpu"), {"num_labels": 2}).eval()
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([[7, 8, 9]])).logits
        mask = torch.tensor([[1, 1, 1, 0, 0]])
        padded = model(input_ids=torch.tensor([[7, 8, 9, 2, 2]]), attention_mask=mask).logits
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-5)
