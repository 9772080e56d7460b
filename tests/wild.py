"""Adapters in the wild that the libraries themselves made, and the ΔW that these compute (`fixtures/make_*.py`)."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lorabench.updates import formats
from lorabench.updates.readers._entry import TensorFile

FIXTURES = Path(__file__).parent / "fixtures"
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
    "kohya_zimage": Case(format="kohya", scale="file"),
    "kohya_unet": Case(format="kohya", scale="file"),
    "loralib_lora": Case(format="loralib", scale="--alpha", alpha=6, notes=("2 fused linears, such as c_attn",)),
    "loralib_weights": Case(
        format="loralib", scale="--alpha", alpha=6, notes=("1 fused linear, such as first", "convolutions", "left out")
    ),
    "lycoris_dora": Case(format="kohya", scale="file", notes=(DORA,)),
    "lycoris_dora_input": Case(format="kohya", scale="file", notes=(DORA,)),
    "lycoris_full": Case(format="lycoris", scale=None),
    "lycoris_locon": Case(format="kohya", scale="file"),
    "lycoris_loha": Case(format="lycoris", scale="file"),
    "lycoris_loha_tucker": Case(format="lycoris", scale="file"),
    "lycoris_lokr": Case(format="lycoris", scale="file"),
    "lycoris_lokr_both": Case(format="lycoris", scale="file"),
    "lycoris_lokr_tucker": Case(format="lycoris", scale="file"),
    "lycoris_lokr_whole": Case(format="lycoris", scale="file", notes=("alpha of 3 layers is not used",)),
    "lycoris_lora": Case(format="kohya", scale="file"),
    "lycoris_lora_zero": Case(format="kohya", scale="assumed", notes=(NO_ALPHA,)),
    "mlx_dora": Case(format="mlx", scale="config", notes=(DORA,)),
    "mlx_experts": Case(format="mlx", scale="config"),
    "mlx_lora": Case(format="mlx", scale="config"),
    "torchtune_alone": Case(format="torchtune", scale="--alpha", alpha=5, notes=(ROTARY,)),
    "torchtune_dora": Case(format="torchtune", scale="config", notes=(ROTARY, DORA)),
    "torchtune_lora": Case(format="torchtune", scale="config", notes=(ROTARY,)),
    "xlabs_flux": Case(format="xlabs", scale="assumed", notes=(NO_ALPHA,)),
}


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
