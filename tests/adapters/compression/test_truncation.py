"""Truncated updates against numpy's SVD of the dense ΔW, and the files against PEFT itself."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from lorabench.adapters.compression.compress import compress
from lorabench.adapters.compression.compressible import open_subject
from lorabench.adapters.compression.truncation import cut
from lorabench.config.decode import InputError
from lorabench.store.store import Store
from lorabench.updates.update import Update, save_svds
from tests.updates.test_formats import ADAPTER, CASES, CONFIG, lora_layers, mathematical, tuned

ENERGIES = [0.5, 0.9, 1.0]


def best(delta, energy):
    """The best approximation that keeps this energy, its rank and its share, by numpy in float64."""
    U, S, Vh = np.linalg.svd(delta, full_matrices=False)
    shares = np.square(S).cumsum() / np.square(S).sum()
    rank = int(np.argmax(shares >= energy * (1 - 1e-10))) + 1
    return (U[:, :rank] * S[:rank]) @ Vh[:rank], rank, shares[rank - 1]


@settings(max_examples=25, deadline=None)
@given(M=st.integers(1, 12), N=st.integers(2, 12), r=st.integers(1, 8), seed=st.integers(0, 99), dense=st.booleans())
def test_a_cut_is_the_best_approximation_and_of_the_smallest_rank(M, N, r, seed, dense):
    g = torch.Generator().manual_seed(seed)
    B, A = torch.randn(M, r, generator=g), torch.randn(r, N, generator=g)
    delta = (B @ A).double().numpy()
    update = Update(parameter="lin.weight", B=B @ A) if dense else Update(parameter="lin.weight", B=B, A=A)
    for energy, found in zip(ENERGIES[:2], cut(update, ENERGIES[:2]), strict=True):
        expected, rank, share = best(delta, energy)
        assert (found.new_rank, found.rank) == (rank, None if dense else r)
        assert found.kept / found.energy == pytest.approx(share, abs=1e-5) and share >= energy - 1e-9
        product = (found.B @ found.A).double().numpy()
        lost = np.square(delta - expected).sum()
        assert np.square(delta - product).sum() == pytest.approx(lost, rel=1e-3, abs=1e-9 * np.square(delta).sum())
        assert found.lost == pytest.approx(lost, rel=1e-3, abs=1e-9 * np.square(delta).sum())


def test_both_factors_have_the_same_norm():
    (found,) = cut(Update(parameter="lin.weight", B=torch.randn(30, 20)), [0.9])
    assert found.B.norm().item() == pytest.approx(found.A.norm().item(), rel=1e-5)


def test_what_is_lost_counts_the_rounding_of_the_factors():
    update = Update(parameter="lin.weight", B=torch.randn(30, 4), A=torch.randn(4, 20))
    (found,) = cut(update, [1.0], torch.bfloat16)
    product = found.B.double() @ found.A.double()
    assert found.B.dtype == torch.bfloat16 and found.lost > 1e-7 * found.energy
    assert found.lost == pytest.approx(float((update.dense().double() - product).square().sum()), rel=1e-3)


def test_no_change_has_no_cut():
    assert cut(Update(parameter="lin.weight", B=torch.zeros(4, 3)), [0.9]) == []


def compressed(folder, energies, tmp_path):
    store = Store(tmp_path / "results")
    records = compress(store, open_subject(store, str(folder)), energies, "cpu", lambda _: None)
    return records[0], [
        (record, store.root / "compressions" / record["compression_id"] / "adapter") for record in records[1:]
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_the_truncated_adapter(case, tmp_path):
    model = tuned(case)
    model.save_pretrained(tmp_path / "adapter")
    deltas = {
        name: mathematical(m.get_delta_weight("default"), m).double().numpy() for name, m in lora_layers(model).items()
    }
    full, made = compressed(tmp_path / "adapter", ENERGIES, tmp_path)
    factors = [tensor for name, tensor in load_file(tmp_path / "adapter" / ADAPTER).items() if ".lora_" in name]
    assert full["num_parameters"] == sum(tensor.numel() for tensor in factors)
    assert full["metrics"] == {} and full["bytes"] == (tmp_path / "adapter" / ADAPTER).stat().st_size
    for energy, (record, folder) in zip(ENERGIES, made, strict=True):
        again = PeftModel.from_pretrained(CASES[case][0](), folder)
        layers = lora_layers(again)
        assert layers.keys() == deltas.keys()
        for name, module in layers.items():
            expected, rank, _ = best(deltas[name], energy)
            found = mathematical(module.get_delta_weight("default"), module)
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
            assert module.scaling["default"] == 1 and module.r["default"] == rank
        ranks = [row["rank"] for row in record["layers"]]
        assert record["ranks"] == {"min": min(ranks), "median": np.median(ranks), "max": max(ranks)}
        total = sum(np.square(delta).sum() for delta in deltas.values())
        lost = sum(np.square(delta - best(delta, energy)[0]).sum() for delta in deltas.values())
        assert record["relative_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-5)
        assert record["kept"] == pytest.approx(1 - lost / total, abs=1e-6) and record["kept"] > energy - 1e-9
        heads = {name: t for name, t in model.state_dict().items() if "modules_to_save" in name}
        state = again.state_dict()
        assert bool(heads) == (case == "bert-head")
        assert all(torch.equal(tensor, state[name]) for name, tensor in heads.items())


def test_factors_of_16_bits_stay_so(tmp_path):
    tuned("llama").to(torch.bfloat16).save_pretrained(tmp_path / "adapter")
    _, [(record, folder)] = compressed(tmp_path / "adapter", [0.95], tmp_path)
    assert {tensor.dtype for tensor in load_file(folder / ADAPTER).values()} == {torch.bfloat16}
    assert record["relative_error"] > (1 - record["kept"]) ** 0.5, "rounding is an error too"


def test_an_untrained_layer_is_left_out(tmp_path):
    model = tuned("llama")
    layer = next(iter(lora_layers(model).values()))
    torch.nn.init.zeros_(layer.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    _, [(record, folder)] = compressed(tmp_path / "adapter", [0.95], tmp_path)
    assert record["left_out"]["num_unchanged"] == 1 and len(record["layers"]) == 5
    assert len(json.loads((folder / CONFIG).read_text())["target_modules"]) == 5
    for module in lora_layers(model).values():
        torch.nn.init.zeros_(module.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "nothing")
    with pytest.raises(InputError, match="every ΔW is 0"):
        compressed(tmp_path / "nothing", [0.95], tmp_path)


def test_singular_values_alone_are_refused(tmp_path):
    (tmp_path / "kept").mkdir()
    save_svds([Update(parameter="lin.weight", B=torch.randn(9, 6))], tmp_path / "kept", keep=2)
    with pytest.raises(InputError, match=r"lin\.weight: only singular values and vectors"):
        compressed(tmp_path / "kept", [0.95], tmp_path)


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.1])
def test_an_energy_is_a_share(energy, tmp_path):
    tuned("llama").save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=f"--energy {energy:g}: must be above 0 and at most 1"):
        compressed(tmp_path / "adapter", [energy], tmp_path)
