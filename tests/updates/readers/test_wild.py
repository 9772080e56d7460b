"""Adapters in the wild: files made by the libraries themselves, held against the ΔW that those libraries compute.

`tests/fixtures/make_*.py` made `tests/fixtures/adapters`, and says with which versions and how.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabench.config.decode import InputError
from lorabench.updates import formats
from lorabench.updates.readers import kohya, loralib
from lorabench.updates.readers._entry import Source, TensorFile
from lorabench.updates.readers.peft_lora import ADAPTER_FILE
from tests.wild import ADAPTERS, CASES, FIXTURES, copy, distance, edit, expected_of, opened, path_of

FACTORED = sorted(name for name in CASES if "full" not in name)


def test_every_fixture_is_tested_and_has_its_script():
    """PEFT's own have tests of their own."""
    folders = [folder for folder in ADAPTERS.iterdir() if not folder.name.startswith("peft_")]
    assert {folder.name for folder in folders} == CASES.keys() | {"adapterhub_prefix", "adapterhub_bottleneck"}
    scripts = "".join(script.read_text("utf-8") for script in FIXTURES.glob("make_*.py"))
    assert all(f"adapters/{folder.name.partition('_')[0]}_*" in scripts for folder in folders)
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*.*") if file.is_file()) < 300_000


@pytest.mark.parametrize("name", CASES)
def test_format_scale_and_notes(name):
    case, adapter = CASES[name], opened(name)
    assert (adapter.format, adapter.scale_source) == (case.format, case.scale)
    assert len(adapter.notes) == len(case.notes)
    assert all(told in note for told, note in zip(case.notes, adapter.notes, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_what_the_library_computes(name):
    adapter, expected = opened(name), expected_of(name)
    assert adapter.entries.keys() == expected.keys()
    for parameter, entry in adapter.entries.items():
        update, delta = entry.load(), expected[parameter]
        assert entry.shape == update.shape == delta.shape
        assert (update.parameter, update.scale_source) == (parameter, CASES[name].scale)
        assert update.part == ("sBA" if "[sBA]" in parameter else None)
        assert distance(update.dense(), delta) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_singular_value_decomposition_is_that_of_the_librarys(name):
    expected = expected_of(name)
    for layer in formats.load_layers(opened(name)):
        delta = expected[layer.parameter]
        exact = torch.linalg.svdvals(delta)
        count = len(layer.svd.S)
        assert torch.allclose(layer.svd.S.double(), exact[:count], rtol=1e-5, atol=1e-5 * exact[0])
        assert exact[count:].sum() < 1e-5 * exact[0]
        assert distance((layer.svd.U * layer.svd.S.to(layer.svd.U.dtype)) @ layer.svd.Vh, delta) < 1e-5
        if layer.rank is None:
            assert layer.precision == "float32"
        else:
            assert torch.linalg.matrix_rank(delta, rtol=1e-6) <= layer.rank < max(delta.shape)


DORA = ["diffusers_model", "lycoris_dora", "lycoris_dora_input", "mlx_dora", "torchtune_dora"]


@pytest.mark.parametrize("name", DORA)
def test_dora_on_its_base_is_what_the_library_merges(name):
    folder = ADAPTERS / name
    adapter, alone = opened(name, base=folder / "base.safetensors"), opened(name)
    whole = {key: delta.flatten(1).double() for key, delta in load_file(folder / "whole.safetensors").items()}
    assert adapter.entries.keys() == whole.keys() | alone.entries.keys() and len(whole) == len(alone.entries)
    assert not any("DoRA" in note for note in adapter.notes)
    for parameter, delta in whole.items():
        update = adapter.entries[parameter].load()
        assert distance(update.dense(), delta) < 1e-5 and (update.part, update.scale) == (None, None)


def test_dora_of_layers_that_the_base_has_not(tmp_path):
    base = load_file(ADAPTERS / "lycoris_dora" / "base.safetensors")
    proj = base.pop("proj.weight")
    base |= {f"{wrapper}.proj.weight": proj.clone() for wrapper in ("one", "two")}  # so that it is not certain which
    base["x_conv.weight"] = base["conv.weight"].clone()  # no module `conv`
    save_file(base, tmp_path / "base.safetensors")
    adapter = opened("lycoris_dora", base=tmp_path / "base.safetensors")
    assert adapter.notes == ("DoRA in 1 layer: what is read is s B A; ΔW needs W0 by the same names (--base)",)
    assert "lora_unet_proj.weight" not in adapter.entries and "lora_unet_conv.weight" in adapter.entries


@pytest.mark.parametrize("name", ["lycoris_dora", "lycoris_dora_input"])
def test_magnitudes_that_do_not_fit_the_base(name, tmp_path):
    key = "lora_unet_proj.dora_scale"
    shape = (1, 7) if name.endswith("input") else (7, 1)
    edit(copy(name, tmp_path), lambda tensors: tensors.update({key: torch.ones(shape)}))
    with pytest.raises(InputError, match=r"lora_unet_proj.weight: ΔW \(12, 16\), m 7 and W0 \(12, 16\)"):
        formats.open_adapter(tmp_path, base=ADAPTERS / name / "base.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_the_scale_is_told_wherever_there_is_one(name):
    for layer in formats.load_layers(opened(name)):
        assert layer.scale_source == CASES[name].scale and (layer.scale is None) == (layer.scale_source is None)


def test_the_scale_is_the_one_in_the_update():
    scales = {"mlx_lora": 2.5, "torchtune_lora": 2.5, "loralib_weights": 3.0, "adapterhub_bert": 3.0,
              "lycoris_loha": 0.5, "lycoris_lokr": 3.0, "lycoris_lokr_whole": 1.0}  # fmt: skip
    for name, scale in scales.items():
        assert {entry.load().scale for entry in opened(name).entries.values()} == {scale}, name


RANKS = {
    "lycoris_locon": {"conv": 2, "point": 2, "proj": 2},
    "lycoris_loha": {"conv": 4, "point": 4, "proj": 4},  # Khatri-Rao: r²
    "lycoris_loha_tucker": {"conv": None, "point": None, "proj": None},  # 4² is no longer thin
    "lycoris_lokr": {"conv": 2, "point": 2, "proj": 2},  # w1 (2, 2) times r
    "lycoris_lokr_both": {"conv": 1, "point": 2, "proj": 1},
    "lycoris_lokr_whole": {"conv": None, "point": None, "proj": None},
}


@pytest.mark.parametrize("name", RANKS)
def test_products_keep_factors_where_these_are_thinner(name):
    layers = {layer.layer.removeprefix("lora_unet_"): layer.rank for layer in formats.load_layers(opened(name))}
    assert layers == RANKS[name]


def test_ranks_of_fused_linears_and_convolutions():
    ranks = {layer.layer: layer.rank for name in ("loralib_lora", "loralib_weights")
             for layer in formats.load_layers(opened(name))}  # fmt: skip
    assert (ranks["c_attn"], ranks["qkv"], ranks["first"], ranks["embedding"]) == (4, 6, 2, 2)
    assert (ranks["thin"], ranks["wide"], ranks["grouped"]) == (8, None, None)  # r h h = 8 of 10 rows


def test_blocks_without_lora_are_zero():
    delta = opened("loralib_lora").entries["c_attn.weight"].load().dense()
    assert not delta[8:16].any() and delta[:8].any() and delta[16:].any()


def test_vectors_are_read_too():
    found = kohya.find(Source(path=path_of("lycoris_full")))
    expected = load_file(ADAPTERS / "lycoris_full" / "expected.safetensors")
    assert found.entries.keys() == expected.keys() > opened("lycoris_full").entries.keys()
    for parameter in ("lora_unet_norm.weight", "lora_unet_norm.bias", "lora_unet_proj.bias"):
        update = found.entries[parameter].load()
        assert update.shape == (len(expected[parameter]), 1) and update.scale_source is None
        assert torch.allclose(update.dense()[:, 0], expected[parameter])


@pytest.mark.parametrize("name", ["diffusers_plain", "loralib_lora", "loralib_weights", "torchtune_alone"])
def test_alpha_is_what_the_user_says_else_assumed_to_be_the_rank(name):
    assumed, told = opened(name, alpha=None), opened(name, alpha=12.0)
    assert (assumed.scale_source, told.scale_source) == ("assumed", "--alpha")
    assert "assumed" in assumed.notes[0] and not any("α = r" in note for note in told.notes)
    for parameter, entry in assumed.entries.items():
        update = entry.load()
        rank = {"diffusers_plain": 1 if "text" in parameter else 3 if "conv1" in parameter else 2}.get(name, 2)
        assert update.scale_source == "assumed"
        assert distance(told.entries[parameter].load().dense(), update.dense().double() * (12 / rank)) < 1e-5


@pytest.mark.parametrize("name", [name for name in FACTORED if CASES[name].scale in ("config", "file")])
def test_what_the_file_says_of_alpha_counts_more(name):
    entries = opened(name).entries
    for parameter, entry in opened(name, alpha=99.0).entries.items():
        assert torch.equal(entry.load().dense(), entries[parameter].load().dense())


def test_torchtunes_folder_is_read_in_pefts_form_which_has_the_same_spectrum():
    folder = formats.open_adapter(ADAPTERS / "torchtune_lora" / "adapter")
    assert folder.format == "peft" and len(folder.entries) == 6
    own = {layer.kind: layer.svd for layer in formats.load_layers(opened("torchtune_lora"))}
    peft = {layer.kind: layer.svd for layer in formats.load_layers(folder)}
    for kind in ("q_proj", "k_proj", "v_proj"):
        assert torch.allclose(own[kind].S, peft[kind].S, rtol=1e-5)
        assert torch.allclose(own[kind].Vh.abs(), peft[kind].Vh.abs(), atol=1e-5)
        same = torch.allclose(own[kind].U.abs(), peft[kind].U.abs(), atol=1e-5)
        assert same == (kind == "v_proj")


def test_torchtunes_dora_is_one_in_pefts_form_too():
    """Its configuration does not say so; the magnitudes are there, those of q and k in another order than rows."""
    folder = ADAPTERS / "torchtune_dora" / "adapter"
    adapter = formats.open_adapter(folder)
    assert all(entry.load().part == "sBA" for entry in adapter.entries.values()) and len(adapter.entries) == 6
    needs_base, export = adapter.notes
    assert needs_base == "DoRA: ΔW needs W0; this is its s B A; give --base" and "torchtune's export, which" in export
    own, exported = torch.load(folder / "adapter_model.pt", weights_only=True), load_file(folder / ADAPTER_FILE)
    theirs, ours = "layers.0.attn.q_proj", "base_model.model.model.layers.0.self_attn.q_proj"
    assert torch.equal(own[f"{theirs}.magnitude"], exported[f"{ours}.lora_magnitude_vector"])
    assert not torch.equal(own[f"{theirs}.lora_b.weight"], exported[f"{ours}.lora_B.weight"])


@pytest.mark.parametrize("name", ["lycoris_lora", "lycoris_loha", "lycoris_lokr_whole", "diffusers_metadata"])
def test_half_precision_is_read_as_float32(name, tmp_path):
    file = copy(name, tmp_path)
    edit(file, lambda tensors: tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()}))
    for parameter, entry in formats.open_adapter(tmp_path).entries.items():
        update = entry.load()
        assert update.B.dtype == torch.float32
        assert update.precision == (None if update.A is not None else "bfloat16")
        assert distance(update.dense(), expected_of(name)[parameter]) < 2e-2


@pytest.mark.parametrize("name", CASES)
def test_opening_reads_no_more_than_the_alphas(name, monkeypatch):
    read, real = [], TensorFile.read

    def spy(self, key):
        read.append(key)
        return real(self, key)

    monkeypatch.setattr(TensorFile, "read", spy)
    opened(name)
    assert all(key.endswith(".alpha") for key in read)


def test_some_alphas_are_missing(tmp_path):
    file = copy("lycoris_lora", tmp_path)
    edit(file, lambda tensors: tensors.pop("lora_unet_proj.alpha"))
    adapter = formats.open_adapter(tmp_path)
    assert adapter.scale_source == "assumed" and adapter.notes[0].startswith("1 of 3 layers: no alpha")
    sources = {name: entry.load().scale_source for name, entry in adapter.entries.items()}
    assert sources["lora_unet_proj.weight"] == "assumed" and sources["lora_unet_conv.weight"] == "file"
    factors = load_file(file)
    product = factors["lora_unet_proj.lora_up.weight"] @ factors["lora_unet_proj.lora_down.weight"]
    assert torch.allclose(adapter.entries["lora_unet_proj.weight"].load().dense(), product)


def test_diffusers_with_alphas_beside_the_factors(tmp_path):
    names = ("transformer.blocks.0.attn.to_q", "transformer.blocks.0.attn.to_k")
    tensors = {f"{name}.lora_{side}.weight": torch.randn(4, 4) for name in names for side in "AB"}
    save_file(tensors | {f"{names[0]}.alpha": torch.tensor(2.0)}, tmp_path / "lora.safetensors")
    adapter = formats.open_adapter(tmp_path / "lora.safetensors")
    assert adapter.notes == ("1 of 2 layers: no alpha in the file: α = r is assumed, so that the scale is 1 "
                             "(--alpha tells another)",)  # fmt: skip
    for name, scale in zip(names, (0.5, 1.0), strict=True):
        product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        assert torch.allclose(adapter.entries[f"{name}.weight"].load().dense(), product * scale)


FUSED = {
    "lora_unet_single_blocks_0_linear1.lora_{}.weight": ("up", "down"),
    "transformer.single_blocks.0.linear1.lora_{}.weight": ("B", "A"),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_are_split_whichever_the_format(name, tmp_path):
    (up, down), module = FUSED[name], name.rpartition(".lora_")[0]
    tensors = {name.format(up): torch.randn(30, 2), name.format(down): torch.randn(2, 8)}
    save_file(tensors, tmp_path / "lora.safetensors")
    entries = formats.open_adapter(tmp_path).entries
    shapes = {key.removeprefix(module): entry.shape for key, entry in entries.items()}
    assert shapes == {"[q].weight": (8, 8), "[k].weight": (8, 8), "[v].weight": (8, 8), "[mlp].weight": (6, 8)}
    parts = [entries[f"{module}[{part}].weight"].load().dense() for part in ("q", "k", "v", "mlp")]
    assert torch.allclose(torch.cat(parts), tensors[name.format(up)] @ tensors[name.format(down)], atol=1e-6)


def test_mlx_without_its_configuration(tmp_path):
    file = copy("mlx_lora", tmp_path / "source").rename(tmp_path / "0000100_adapters.safetensors")
    adapter = formats.open_adapter(file)
    assert adapter.scale_source == "assumed" and "no scale in a configuration" in adapter.notes[0]
    for parameter, delta in expected_of("mlx_lora").items():
        assert distance(adapter.entries[parameter].load().dense(), delta / 2.5) < 1e-5


def test_loralib_blocks_that_the_weight_counts(tmp_path):
    """Two LoRAs of four blocks: nothing says which."""
    tensors = {"w.lora_A": torch.randn(4, 3), "w.lora_B": torch.randn(10, 2), "w.weight": torch.zeros(20, 3)}
    torch.save(tensors, tmp_path / "lora.pt")
    found = loralib.find(Source(path=tmp_path))
    assert "1 fused linear, such as w: LoRA is assumed to be on for blocks of rows 1, 2" in found.notes
    delta = found.entries["w.weight"].load().dense()
    assert delta.shape == (20, 3) and not delta[10:].any()
    assert torch.allclose(delta[5:10], tensors["w.lora_B"][5:] @ tensors["w.lora_A"][2:])
