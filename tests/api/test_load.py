"""`lorabench.load` in a notebook."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lorabench
from lorabench.config.decode import InputError
from lorabench.updates import formats
from tests.adapter_files import SCALE, deltas, save_lora

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    return folder, deltas(save_lora(folder))


def test_updates_are_the_thin_svds_of_pefts_own_changes(lora):
    folder, expected = lora
    updates = lorabench.load(folder)
    assert {*updates} == {*expected} and len(updates) == 6
    for layer, svd in updates.items():
        assert svd.S.numpy() == pytest.approx(torch.linalg.svdvals(expected[layer])[:4].numpy(), rel=1e-5)
        assert ((svd.U * svd.S @ svd.Vh.double()) - expected[layer]).abs().max() < 1e-5


def test_three_lines_of_a_notebook(lora):
    updates = lorabench.load(str(lora[0]))
    assert updates[LAYER].S.shape == (4,)
    assert repr(updates) == (
        f"<lorabench updates of {lora[0]} (peft, scale from config), 6 layers: model.layers.0.mlp.up_proj, …>"
    )


def test_what_the_reader_says_and_each_layer(lora):
    updates = lorabench.load(lora[0])
    assert (updates.format, updates.scale_source, updates.notes) == ("peft", "config", ())
    assert updates.layer(LAYER).rank == 4 and updates.layers[LAYER].scale == SCALE
    assert [*updates.layers] == [*updates]


def test_layers_are_loaded_when_asked_for_and_the_last_one_is_kept(lora, monkeypatch):
    loaded = []
    load_layer = formats.load_layer
    monkeypatch.setattr(formats, "load_layer", lambda entry: loaded.append(entry.parameter) or load_layer(entry))
    updates = lorabench.load(lora[0])
    assert LAYER in updates and "x" not in updates and len([*updates.keys()]) == 6 and not loaded
    assert updates[LAYER].U is updates[LAYER].U and loaded == [f"{LAYER}.weight"]


def test_errors_name_what_is_near_and_what_is_wrong(lora, tmp_path):
    with pytest.raises(KeyError, match=r"no layer '.*q_prj'; did you mean 'model.layers.0.self_attn.q_proj'\?"):
        lorabench.load(lora[0])[LAYER.replace("q_proj", "q_prj")]
    assert lorabench.load(lora[0]).get("nothing like it") is None
    with pytest.raises(InputError, match="holds no file of tensors"):
        lorabench.load(tmp_path)


def test_importing_is_light():
    """In a process of its own: no heavy module comes with `import lorabench`, nor any other of the package's."""
    program = "import sys, lorabench; print(sorted({name.partition('.')[0] for name in sys.modules}), *sys.modules)"
    call = [sys.executable, "-c", program]
    done = subprocess.run(call, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    found = {name for name in done.stdout.split() if name.startswith("lorabench")}
    assert {name.split(".")[1] for name in found - {"lorabench"}} == {"api", "config"}
    assert not re.search("'(torch|numpy|pandas|matplotlib|transformers|rich)'", done.stdout)
