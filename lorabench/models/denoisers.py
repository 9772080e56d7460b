"""Denoisers of diffusers' pipelines: the network that a diffusion model trains, by pipeline folder or Hub id.

A pipeline's folder has `model_index.json`, which names its parts, and a folder a part: `unet` or `transformer` is the
denoiser, and what is fine-tuned; `scheduler` says how noise is put on; `vae` and `text_encoder` make latents and
embeddings. Weights are called as in the denoiser itself.

Shapes: n examples, c channels, h height, w width of a latent, t tokens of a text, d width of its embeddings.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.decode import InputError
from lorabench.config.quote import clip, show_path
from lorabench.data.image_folder import VISION

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

AUTO_CLASS = "DiffusionPipeline"
"""What of diffusers a task's base is a part of; see `Task.auto_class`."""
INDEX = "model_index.json"
PARTS = ("unet", "transformer")
"""The folders of a pipeline that a denoiser is in."""
WEIGHED = (*PARTS, "vae", "text_encoder")
NEEDED = (*WEIGHED, "tokenizer", "scheduler")
"""How the folders begin that training reads; those of WEIGHED hold weights."""
TIMESTEP = "timestep"
"""The key of a batch that tells how much noise is on each example, (n,) as the denoiser takes it."""
CONDITIONS = ("class_labels", "encoder_hidden_states", "text_embeds", "time_ids", "pooled_projections")
"""The keys of a batch that say what is to be seen: a class (n,), or texts (n, t, d) and (n, d)."""
FLUX_GUIDANCE = 3.5
"""What a Flux that has guidance as an input is told in training, as in diffusers' own example."""
PIPELINE_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls a LoRA's file."""


def is_pipeline(folder: Path) -> bool:
    return os.path.isfile(folder / INDEX)  # False also of a name that no file system takes


def downloaded(source: str, revision: str | None, offline: bool) -> Path:
    """The folder in the Hub's cache. InputError where it is no pipeline, or cannot be had."""
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.txt", "*.model", "*.safetensors"]
    allowed = [
        INDEX,
        *(f"{part}/{kind}" for part in ("scheduler", *PARTS, "vae", "t*encoder*", "tokenizer*") for kind in kinds),
    ]
    try:
        found = Path(snapshot_download(
            source, revision=revision, local_files_only=offline, allow_patterns=allowed,
            ignore_patterns=["*.fp16.*", "*non_ema*"],
        ))  # fmt: skip
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        says = "neither a local folder nor a Hub model that loads"
        raise InputError(f'model = "{show_path(source)}": {says}: {reason}') from error
    if not is_pipeline(found):
        raise InputError(f'model = "{show_path(source)}": has no {INDEX}, as diffusers saves pipelines')
    return found


def pipeline_index(folder: Path, source: str) -> dict[str, Any]:
    """What `model_index.json` says. InputError where it is none, or has no denoiser that is known here."""
    try:
        found = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f'model = "{show_path(source)}": {INDEX} cannot be read: {clip(error)}') from None
    found = {key: value for key, value in found.items() if value != [None, None]} if isinstance(found, dict) else {}
    if not any(found.get(part) for part in PARTS):
        raise InputError(f'model = "{show_path(source)}": {INDEX} names no denoiser: none of {", ".join(PARTS)}')
    return found


def check_parts(folder: Path, source: str) -> None:
    """InputError with the parts that the pipeline's index names, and whose files or weights are not there."""
    named = [part for part, what in pipeline_index(folder, source).items() if what and part.startswith(NEEDED)]
    says = []
    for part in named:
        files = os.listdir(folder / part) if (folder / part).is_dir() else []
        if not files:
            says.append(f"{INDEX} names {part}, and there is no such folder with files")
        elif part.startswith(WEIGHED) and not any(file.endswith((".safetensors", ".bin")) for file in files):
            says.append(f"its folder {part} has no weights (*.safetensors)")
    if says:
        raise InputError([f'model = "{show_path(source)}": {each}' for each in says])
    for part in named:
        check_whole(folder / part, source)


def check_whole(folder: Path, source: str) -> None:
    """InputError with the first file of a folder's weights that is torn: each header is read, and the file's length."""
    from lorabench.updates.tensorfile import open_tensors

    for file in sorted(folder.glob("*.safetensors")):
        try:
            open_tensors(file)
        except InputError as error:
            raise InputError(f'model = "{show_path(source)}": {error}') from None


def denoiser_folder(folder: Path, source: str) -> Path:
    """`unet` or `transformer` of a pipeline's folder."""
    index = pipeline_index(folder, source)
    return folder / next(part for part in PARTS if index.get(part))


def denoiser_class(folder: Path, source: str) -> Any:
    """diffusers' class of the denoiser. InputError where diffusers is missing, or has none of that name."""
    try:
        import diffusers
    except ImportError:
        raise InputError(f'model = "{show_path(source)}": pipelines of diffusers need {VISION}') from None
    index = pipeline_index(folder, source)
    name = next(index[part][1] for part in PARTS if index.get(part))
    if not hasattr(diffusers, name):
        raise InputError(f'model = "{show_path(source)}": diffusers {diffusers.__version__} has no {name}')
    return getattr(diffusers, name)


def read_config(folder: Path, source: str) -> dict[str, Any]:
    """The denoiser's configuration."""
    cls = denoiser_class(folder, source)
    try:
        return dict(cls.load_config(denoiser_folder(folder, source), local_files_only=True))
    except (OSError, ValueError) as error:
        raise InputError(f'model = "{show_path(source)}": {clip(error)}') from None


def from_config(folder: Path, source: str, config: dict[str, Any], device: torch.device) -> nn.Module:
    """A denoiser of random weights."""
    with device:
        model: nn.Module = denoiser_class(folder, source).from_config(config)
    return model


def load(folder: Path, source: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser on the CPU, and what its files lack, as transformers reports it."""
    cls = denoiser_class(folder, source)
    try:
        model, report = cls.from_pretrained(
            denoiser_folder(folder, source), torch_dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f'model = "{show_path(source)}": its denoiser does not load: {reason}') from error
    return model, {**report, "mismatched_keys": report.get("mismatched_keys") or []}


def quantize(model: nn.Module, quantization: str, compute: torch.dtype) -> None:
    """Put bitsandbytes' layers in place of all linear ones, as transformers does of its models; moving them to their
    device then quantizes. diffusers does so itself, and refuses to without a GPU."""
    import bitsandbytes as bnb
    from torch import nn

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        sides, bias = (module.in_features, module.out_features), module.bias
        if quantization == "int8":
            new: nn.Module = bnb.nn.Linear8bitLt(*sides, bias is not None, has_fp16_weights=False, threshold=6.0)
            new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            options = {"compute_dtype": compute, "compress_statistics": True, "quant_type": "nf4"}
            new = bnb.nn.Linear4bit(*sides, bias is not None, **options)
            new.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
        if bias is not None:
            new.bias = nn.Parameter(bias.data, requires_grad=False)
        model.set_submodule(name, new)
    model.is_quantized = True


def is_denoiser(model: Any) -> bool:
    """Whether a model, PEFT's wrapping apart, is a denoiser of diffusers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return any(cls.__module__.startswith("diffusers.") for cls in type(base).__mro__)


def save_for_pipelines(model: Any, folder: Path) -> None:
    """Beside a saved LoRA, write it once more as `pipeline.load_lora_weights` of diffusers reads it."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "adapter_config.json").read_text())
    if config["peft_type"] != "LORA":
        return  # diffusers' pipelines load no other
    part = "unet" if type(model.get_base_model()).__name__.startswith("UNet") else "transformer"
    tensors = {f"{part}.{name.removeprefix('base_model.model.')}": tensor
               for name, tensor in load_file(folder / "adapter_model.safetensors").items()}  # fmt: skip
    # One key: safetensors writes several in an order of its own, and equal adapters should be equal files.
    about = {f"{part}.{key}": value for key, value in sorted(config.items())}
    save_file(tensors, folder / PIPELINE_FILE, metadata={"lora_adapter_metadata": json.dumps(about)})


def predict(model: Any, sample: Tensor, timestep: Tensor, conditions: dict[str, Tensor], **options: Any) -> Tensor:
    """What the denoiser makes of noisy latents (n, c, h, w): noise, velocity or whatever its scheduler trains it for.

    `timestep` and `conditions` (see CONDITIONS) as diffusers' pipelines have them; `options` are PEFT's.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = type(base).__name__
    if kind == "FluxTransformer2DModel":
        return _of_flux(partial(model, **options), base, sample, timestep, conditions)
    if kind == "UNet2DConditionModel":
        added = {key: value for key, value in conditions.items() if key in ("text_embeds", "time_ids")}
        own: dict[str, Any] = {"added_cond_kwargs": added} if added else {}
        found: Tensor = model(
            sample, timestep, encoder_hidden_states=conditions["encoder_hidden_states"], **own, **options
        ).sample
    elif "encoder_hidden_states" in conditions:  # SD3
        own = {key: conditions[key] for key in ("encoder_hidden_states", "pooled_projections")}
        found = model(hidden_states=sample, timestep=timestep, **own, **options).sample
    else:
        found = model(sample, timestep, **conditions, **options).sample
    return found


def _of_flux(model: Any, base: Any, sample: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """Flux takes patches of 2 × 2 as tokens, times from 0 to 1, and where tokens and patches are."""
    import torch

    n, c, h, w = sample.shape
    patches = sample.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(sample)
    texts = conditions["encoder_hidden_states"]
    guidance = sample.new_full((n,), FLUX_GUIDANCE) if base.config.guidance_embeds else None
    found: Tensor = model(
        hidden_states=patches,
        timestep=timestep / 1000,
        guidance=guidance,
        pooled_projections=conditions["pooled_projections"],
        encoder_hidden_states=texts,
        txt_ids=texts.new_zeros(texts.shape[1], 3),
        img_ids=places,
    ).sample
    return found.view(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


TEXT_TOKENS = {"UNet2DConditionModel": 77, "SD3Transformer2DModel": 333, "FluxTransformer2DModel": 512}
"""Of a prompt, as the pipelines of these denoisers have them."""


def some_conditions(model: Any, n: int, device: torch.device) -> dict[str, Tensor]:
    """Zeros of the shapes that a denoiser takes beside latents, to count what it computes, and to try it out."""
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, kind = base.config, type(base).__name__
    zeros = lambda *shape: torch.zeros(n, *shape, device=device)  # noqa: E731
    if kind not in TEXT_TOKENS:
        labels = getattr(config, "num_class_embeds", None)
        return {"class_labels": torch.zeros(n, dtype=torch.long, device=device)} if labels else {}
    width = getattr(config, "cross_attention_dim", None) or config.joint_attention_dim
    found = {
        "encoder_hidden_states": zeros(TEXT_TOKENS[kind], max(width) if isinstance(width, tuple | list) else width)
    }
    if kind != "UNet2DConditionModel":
        return found | {"pooled_projections": zeros(config.pooled_projection_dim)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        found |= {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
    return found


def some_input(model: Any) -> tuple[int, int, int]:
    """(c, h, w) of the latents that a denoiser is made for."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    if type(base).__name__ == "FluxTransformer2DModel":
        return config.in_channels // 4, 64, 64  # of 512 pixels: its configuration names no size
    size = getattr(config, "sample_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width
