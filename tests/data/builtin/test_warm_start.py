import json

import pytest
from safetensors.torch import load_file

from lorabench.data.builtin import warm_start
from lorabench.data.builtin.collect import HERE

MODEL = HERE / "tiny-llama-arithmetic"


def test_it_is_tiny_llama_s_own_architecture_and_tokenizer():
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (MODEL, HERE / "tiny-llama"))
    assert {name: each.shape for name, each in ours.items()} == {name: each.shape for name, each in theirs.items()}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (MODEL / name).read_bytes() == (HERE / "tiny-llama" / name).read_bytes()


def test_it_was_made_by_the_script_as_it_stands():
    about = json.loads((MODEL / "training.json").read_text())
    assert about["spec"] == warm_start.SPEC and 0.3 < about["measures"]["test_exact_match"] < 0.9


def test_the_script_makes_the_files_from_few_steps_too(tmp_path, monkeypatch):
    task = warm_start.SPEC["task"] | {"max_eval": 4}
    monkeypatch.setitem(warm_start.SPEC, "task", task)
    warm_start.warm_start(tmp_path, 2)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in MODEL.iterdir()}
    about = json.loads((tmp_path / "training.json").read_text())
    assert about["spec"]["steps"] == 2 and about["measures"]["test_exact_match"] == pytest.approx(0)
    changed = load_file(tmp_path / "model.safetensors")["model.norm.weight"].float()
    assert 0 < (changed - load_file(HERE / "tiny-llama" / "model.safetensors")["model.norm.weight"]).abs().max() < 0.1
