"""Where `open_adapter` looks, and which reader has the word."""

import json
import types

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.updates import formats, locate
from lorabench.updates.readers._entry import Found
from lorabench.updates.update import Update, save_updates

PREFIX = "base_model.model.q"


def write_adapter(folder, module="q"):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{module}.lora_A.weight": torch.ones(1, 3)}
    tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(4, 1)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    return folder


def test_a_runs_folder_means_its_updates(tmp_path):
    folder = write_adapter(tmp_path / "run" / "updates")
    (tmp_path / "run" / "spec.json").write_text("{}")
    assert locate.adapter_path(tmp_path / "run") == folder
    adapter = formats.open_adapter(tmp_path / "run")
    assert list(adapter.entries) == ["q.weight"] and adapter.source == str(tmp_path / "run")


def test_lorabenchs_own_update_lies_beside_an_adapter(tmp_path):
    write_adapter(tmp_path)
    save_updates([Update(parameter="score.weight", B=torch.ones(2, 2))], tmp_path)
    adapter = formats.open_adapter(tmp_path)
    assert (adapter.format, adapter.scale_source) == ("lorabench + peft", "config")
    assert list(adapter.entries) == ["q.weight", "score.weight"]


def test_two_formats_that_claim_one_source(tmp_path, monkeypatch):
    write_adapter(tmp_path)
    other = types.SimpleNamespace(find=lambda source: Found(format="other", entries={}))
    names, load = plugins.names, formats.importlib.import_module
    monkeypatch.setattr(formats.plugins, "names", lambda folder: [*names(folder), "other"])
    monkeypatch.setattr(
        formats.importlib, "import_module", lambda name: other if name.endswith(".other") else load(name)
    )
    with pytest.raises(InputError, match="could be other or peft: give one file of it alone"):
        formats.open_adapter(tmp_path)


def test_of_several_formats_the_one_that_uses_all_tensors(tmp_path, monkeypatch):
    write_adapter(tmp_path)
    other = types.SimpleNamespace(find=lambda source: Found(format="other", entries={}, left_out=("x",)))
    names, load = plugins.names, formats.importlib.import_module
    monkeypatch.setattr(formats.plugins, "names", lambda folder: [*names(folder), "other"])
    monkeypatch.setattr(
        formats.importlib, "import_module", lambda name: other if name.endswith(".other") else load(name)
    )
    assert formats.open_adapter(tmp_path).format == "peft"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with one repository, `someone/thing`; the calls that it got."""
    write_adapter(tmp_path / "cache")
    write_adapter(tmp_path / "cache" / "second", "k")
    calls = []

    def download(repository, revision, allow_patterns):
        calls.append((repository, revision, allow_patterns))
        if repository != "someone/thing":
            raise LocalEntryNotFoundError("Cannot reach the Hub.\nMore about it.")
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_hub_id_fetches_adapter_files_alone(hub):
    assert list(formats.open_adapter("someone/thing").entries) == ["q.weight"]
    assert list(formats.open_adapter("someone/thing/second").entries) == ["k.weight"]
    with pytest.raises(InputError, match="someone/thing has no adapter there"):
        formats.open_adapter("someone/thing/third")
    assert {call[0] for call in hub} == {"someone/thing"} and hub[0][2] == locate.ADAPTER_PATTERNS


def test_a_hub_that_cannot_be_reached(hub):
    with pytest.raises(InputError, match=r"^no/where: .*not to be had from the .*: Cannot reach the Hub\.$"):
        formats.open_adapter("no/where")
    with pytest.raises(InputError, match=r"^no/where: "):
        formats.open_adapter("someone/thing", base="no/where")


@pytest.mark.parametrize("source", ["./no/where", "/no/where", "../no", "no.safetensors", "no/../where", "builtin:no"])
def test_what_is_no_hub_id_is_not_asked_for(source, hub):
    with pytest.raises(InputError, match="no such file or folder"):
        formats.open_adapter(source)
    with pytest.raises(InputError, match="no such file or folder"):
        locate.weights_path(source)
    assert hub == []


def test_a_path_goes_before_a_hub_id(hub, tmp_path):
    write_adapter(tmp_path / "someone" / "thing", "v")
    assert list(formats.open_adapter("someone/thing").entries) == ["v.weight"]
    with pytest.raises(InputError, match="someone/thang: no such file or folder; someone has the adapters thing"):
        formats.open_adapter("someone/thang")
    assert hub == []


def test_no_pattern_of_adapters_fetches_a_model():
    from huggingface_hub.utils import filter_repo_objects

    adapters = [
        "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "second/adapter_model.safetensors",
        "pytorch_lora_weights.safetensors", "pytorch_adapter.bin", "adapters.safetensors", "adapter_0.pt",
        "unet/my_lora.safetensors", "adapter_model-00001-of-00002.safetensors", "x-lora-f16.gguf",
    ]  # fmt: skip
    models = [
        "model.safetensors",
        "model-q4_k_m.gguf",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "optimizer.pt",
        "README.md",
    ]
    assert list(filter_repo_objects(adapters + models, allow_patterns=locate.ADAPTER_PATTERNS)) == adapters


def test_builtin_weights():
    from lorabench.updates.weightfile import WeightFiles

    files = WeightFiles(locate.weights_path("builtin:tiny-llama"))
    assert files.find("model.layers.0.self_attn.q_proj.weight")
