"""Adapters in the wild: files made by the libraries themselves, held against the ΔW that those libraries compute.

`tests/fixtures/make_*.py` made `tests/fixtures/adapters`, and says with which versions and how.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorabench import formats
from lorabench.decode import InputError
from lorabench.readers import _lycoris, kohya, loralib
from lorabench.readers._entry import Source, TensorFile

FIXTURES = Path(__file__).parents[1] / "fixtures"
ADAPTERS = FIXTURES / "adapters"
DORA = "DoRA in "
ROTARY = "torchtune's rotary order"
NO_ALPHA = "no alpha in the file"


@dataclass(frozen=True, kw_only=True)
class Case:
    format: str
    scale: str | None
    notes: tuple[str, ...] = ()
    alpha: float | None = None
    """What the library was told, where its file does not say."""


CASES = {
    "adapterhub_bert": Case(format="adapterhub", scale="config"),
    "adapterhub_dora": Case(format="adapterhub", scale="config", notes=(DORA,)),
    "adapterhub_gpt2": Case(format="adapterhub", scale="config"),
    "adapterhub_gpt2_key": Case(format="adapterhub", scale="config"),
    "diffusers_linear_layer": Case(format="diffusers", scale="assumed", notes=(NO_ALPHA,)),
    "diffusers_metadata": Case(format="diffusers", scale="file"),
    "diffusers_model": Case(format="diffusers", scale="file", notes=(DORA,)),
    "diffusers_plain": Case(format="diffusers", scale="assumed", notes=(NO_ALPHA,)),
    "diffusers_processor": Case(format="diffusers", scale="assumed", notes=(NO_ALPHA,)),
    "kohya_flux": Case(format="kohya", scale="file"),
    "kohya_unet": Case(format="kohya", scale="file"),
    "loralib_lora": Case(format="loralib", scale="--alpha", alpha=6, notes=("2 fused linears, such as c_attn",)),
    "loralib_weights": Case(
        format="loralib", scale="--alpha", alpha=6, notes=("1 fused linear, such as first", "convolutions", "left out")
    ),
    "lycoris_dora": Case(format="kohya", scale="file", notes=(DORA,)),
    "lycoris_full": Case(format="lycoris", scale=None),
    "lycoris_locon": Case(format="kohya", scale="file"),
    "lycoris_loha": Case(format="lycoris", scale="file"),
    "lycoris_loha_tucker": Case(format="lycoris", scale="file"),
    "lycoris_lokr": Case(format="lycoris", scale="file"),
    "lycoris_lokr_both": Case(format="lycoris", scale="file"),
    "lycoris_lokr_tucker": Case(format="lycoris", scale="file"),
    "lycoris_lokr_whole": Case(format="lycoris", scale="file"),
    "lycoris_lora": Case(format="kohya", scale="file"),
    "lycoris_lora_zero": Case(format="kohya", scale="assumed", notes=(NO_ALPHA,)),
    "mlx_dora": Case(format="mlx", scale="config", notes=(DORA,)),
    "mlx_experts": Case(format="mlx", scale="config"),
    "mlx_lora": Case(format="mlx", scale="config"),
    "torchtune_alone": Case(format="torchtune", scale="--alpha", alpha=5, notes=(ROTARY,)),
    "torchtune_dora": Case(format="torchtune", scale="config", notes=(ROTARY, DORA)),
    "torchtune_lora": Case(format="torchtune", scale="config", notes=(ROTARY,)),
}
FACTORED = sorted(name for name in CASES if "full" not in name)


def path_of(name: str) -> Path:
    """The folder; of torchtune its file, for PEFT's form of the adapter may lie beside it."""
    folder = ADAPTERS / name / "adapter"
    return folder / "adapter_model.pt" if name.startswith("torchtune") else folder


def opened(name: str, **options) -> formats.Adapter:
    return formats.open_adapter(path_of(name), **({"alpha": CASES[name].alpha} | options))


def expected_of(name: str) -> dict[str, torch.Tensor]:
    """The library's ΔW of every matrix."""
    expected = load_file(ADAPTERS / name / "expected.safetensors")
    return {key: delta.flatten(1).double() for key, delta in expected.items() if delta.dim() > 1}


def distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    assert value.shape == expected.shape
    return float((value.double() - expected).norm() / expected.norm())


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


def copy(name: str, folder: Path) -> Path:
    shutil.copytree(ADAPTERS / name / "adapter", folder, dirs_exist_ok=True)
    return next(file for file in folder.iterdir() if file.suffix in (".safetensors", ".pt", ".bin"))


def edit(file: Path, change) -> None:
    """Rewrites the tensors of a file; a safetensors file's header stays."""
    if file.suffix == ".safetensors":
        metadata, tensors = TensorFile(file).metadata, load_file(file)
        change(tensors)
        save_file(tensors, file, metadata=metadata)
    else:
        tensors = torch.load(file, weights_only=True)
        change(tensors)
        torch.save(tensors, file)


DAMAGED = {
    "adapterhub_bert": "query.loras.task.lora_B",
    "diffusers_plain": "conv1.lora_B.weight",
    "diffusers_processor": "attn1.processor.to_q_lora.up.weight",
    "kohya_unet": "conv1.lora_up.weight",
    "loralib_lora": "linear.lora_B",
    "lycoris_locon": "conv.lora_mid.weight",
    "lycoris_loha": "conv.hada_w2_a",
    "lycoris_loha_tucker": "conv.hada_t2",
    "lycoris_lokr_both": "proj.lokr_w2_a",
    "mlx_lora": "q_proj.lora_b",
    "torchtune_alone": "w1.lora_b.weight",
}
"""The tensor that is damaged, of a layer that the error must name."""


def damaged(name: str, folder: Path, change) -> tuple[Path, str, tuple[int, ...]]:
    """A copy with one tensor changed; the file, the tensor and its shape now."""
    file, shapes = copy(name, folder), {}

    def one(tensors):
        key = next(key for key in sorted(tensors) if key.endswith(DAMAGED[name]))
        tensors[key] = change(tensors[key]).contiguous()
        shapes[key] = tuple(tensors[key].shape)

    edit(file, one)
    ((key, shape),) = shapes.items()
    return file, key, shape


@pytest.mark.parametrize("name", DAMAGED)
def test_shapes_that_do_not_fit_are_told_with_file_layer_and_both_shapes(name, tmp_path):
    axis = 0 if name.startswith("mlx") else 1
    file, _, shape = damaged(name, tmp_path, lambda tensor: torch.cat([tensor, tensor], axis))
    with pytest.raises(InputError, match="do not fit each other") as error:
        formats.open_adapter(tmp_path)
    text, layer = str(error.value), DAMAGED[name].partition(".")[0]
    assert str(file) in text and layer in text and str(shape) in text and len(re.findall(r"\(\d+, ", text)) >= 2


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_told_with_file_and_tensor(name, value, tmp_path):
    def spoil(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    file, key, _ = damaged(name, tmp_path, spoil)
    adapter = formats.open_adapter(tmp_path)
    with pytest.raises(InputError, match="NaN or Inf") as error:
        list(formats.load_layers(adapter))
    assert str(file) in str(error.value) and key in str(error.value)


@pytest.mark.parametrize("name", [name for name in DAMAGED if not name.startswith("lycoris")])
def test_a_factor_without_its_other_is_told(name, tmp_path):
    file = copy(name, tmp_path)
    edit(file, lambda tensors: tensors.pop(next(key for key in sorted(tensors) if key.endswith(DAMAGED[name]))))
    with pytest.raises(InputError, match=r"no such tensor") as error:
        formats.open_adapter(tmp_path)
    assert str(file) in str(error.value)


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


@pytest.mark.parametrize("kind", ["prefix", "bottleneck"])
def test_what_has_no_update_is_not_applicable(kind):
    with pytest.raises(InputError, match="not applicable: it has no ΔW"):
        formats.open_adapter(ADAPTERS / f"adapterhub_{kind}" / "adapter")


ADAPTERHUB = {
    "architecture": ("union", "only lora can be read"),
    "composition_mode": ("scale", "its ΔW is not s B A"),
    "use_gating": (True, "its ΔW is not s B A"),
    "vera_d": (0.1, "its ΔW is not s B A"),
    "alpha": (None, "must be a number above 0"),
    "r": (4, "factors have rank 2"),
}


@pytest.mark.parametrize("key", ADAPTERHUB)
def test_adapterhub_configurations_that_are_refused(key, tmp_path):
    copy("adapterhub_bert", tmp_path)
    file, (value, message) = tmp_path / "adapter_config.json", ADAPTERHUB[key]
    config = json.loads(file.read_text())
    config["config"][key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        formats.open_adapter(tmp_path)


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


def test_an_alpha_of_several_numbers(tmp_path):
    edit(copy("lycoris_lora", tmp_path), lambda tensors: tensors.update({"lora_unet_proj.alpha": torch.ones(2)}))
    with pytest.raises(InputError, match=r"lora_unet_proj.alpha: shape \(2,\): must be one number"):
        formats.open_adapter(tmp_path)


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


HEADERS = {
    "{": "not valid JSON",
    "[]": "must be a JSON object",
    '{"unet.r": 7, "unet.lora_alpha": 1}': "r = 7 for .*: its factors have rank 2",
    '{"unet.r": 2}': "lora_alpha = None for to_q: must be a number",
    '{"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": "pissa"}': "needs the initial factors",
    '{"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"(": 1}}': "not a regular expression",
}


@pytest.mark.parametrize("header", HEADERS)
def test_diffusers_headers_that_say_no_scale(header, tmp_path):
    tensors = {f"unet.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": header})
    with pytest.raises(InputError, match=HEADERS[header]):
        formats.open_adapter(tmp_path)


def test_a_fused_layer_of_too_few_rows(tmp_path):
    tensors = {"lora_unet_single_blocks_0_linear1.lora_up.weight": torch.ones(20, 1),
               "lora_unet_single_blocks_0_linear1.lora_down.weight": torch.ones(1, 8)}  # fmt: skip
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="20 rows cannot be split into q, k and v of 8 each"):
        formats.open_adapter(tmp_path)


def test_a_product_that_is_much_larger_than_its_file(tmp_path):
    tensors = {f"lora_unet_x.lokr_w{i}": torch.ones(1000, 1000, dtype=torch.float16) for i in (1, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"lora_unet_x.weight: lokr_w1 \(1000, 1000\).* more than 2³¹ entries"):
        formats.open_adapter(tmp_path)


def test_several_adapters_in_one_folder(tmp_path):
    file = copy("lycoris_lora", tmp_path)
    shutil.copy(file, tmp_path / "adapter-000002.safetensors")
    with pytest.raises(InputError, match=r"several adapters: name one of adapter-000002.safetensors, adapter.safet"):
        formats.open_adapter(tmp_path)
    assert len(formats.open_adapter(file).entries) == 3


def test_what_trainers_leave_beside_an_adapter_is_not_opened(tmp_path):
    copy("lycoris_lora", tmp_path)
    for name in ("optimizer.pt", "training_args.bin"):
        (tmp_path / name).write_bytes(b"a pickle of something else")
    assert len(formats.open_adapter(tmp_path).entries) == 3


def test_mlx_weights_that_are_no_adapter(tmp_path):
    copy("mlx_lora", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fine_tune_type": "full"}))
    with pytest.raises(InputError, match="fine_tune_type = full: tuned weights, no adapter"):
        formats.open_adapter(tmp_path)


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


SIZE = st.integers(1, 5)


@settings(max_examples=60, deadline=None)
@given(M=st.integers(1, 12), N=st.integers(1, 12), r=SIZE, s=SIZE)
def test_a_hadamard_product_of_any_shape(M, N, r, s):
    B1, A1, B2, A2 = (torch.randn(shape, dtype=torch.float64) for shape in ((M, r), (r, N), (M, s), (s, N)))
    B, A = _lycoris.loha(B1, A1, B2, A2)
    assert (A is None) == (r * s >= min(M, N))
    exact = (B1.numpy() @ A1.numpy()) * (B2.numpy() @ A2.numpy())
    assert np.allclose(B if A is None else B @ A, exact)


@settings(max_examples=60, deadline=None)
@given(shapes=st.tuples(SIZE, SIZE, SIZE, SIZE), r=st.integers(1, 3), whole=st.tuples(st.booleans(), st.booleans()))
def test_a_kronecker_product_of_any_shape(shapes, r, whole):
    pairs = [(torch.randn(m, r).double(), torch.randn(r, n).double()) for m, n in (shapes[:2], shapes[2:])]
    tensors = {}
    for i, (pair, is_whole) in enumerate(zip(pairs, whole, strict=True), 1):
        a, b = pair
        tensors |= {f"lokr_w{i}": a @ b} if is_whole else {f"lokr_w{i}_a": a, f"lokr_w{i}_b": b}
    B, A = _lycoris.lokr(**tensors)
    exact = np.kron(*(a.numpy() @ b.numpy() for a, b in pairs))
    assert np.allclose(B if A is None else B @ A, exact)
    assert A is None or B.shape[1] < min(exact.shape)
