"""Base models: load and quantize (Hub id, local folder, `builtin:NAME`), and compare weights with the base's."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.decode import InputError
from lorabench.update import Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lorabench.spec import RunSpec

BUILTIN = Path(__file__).parent / "builtin"
WEIGHT_FILES = ("*.safetensors", "*.bin")


def resolve(source: str) -> str:
    """What transformers is given for `source`: a local path or a Hub id. InputError for a missing folder."""
    if source.startswith("builtin:"):
        folder = BUILTIN / source.removeprefix("builtin:")
        if not (folder / "config.json").exists():
            choices = ", ".join(sorted(f"builtin:{path.parent.name}" for path in BUILTIN.glob("*/config.json")))
            raise InputError(f'model = "{source}": no such built-in model. Choices: {choices}')
        return str(folder)
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise InputError(f'model = "{source}": the folder has no config.json')
        return str(folder)
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f'model = "{source}": no such folder')
    return source


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The model's tokenizer; where it has no padding token, padding is the end-of-sequence token."""
    from transformers import AutoTokenizer

    tokenizer = _pretrained(source, revision, AutoTokenizer.from_pretrained)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f'model = "{source}": its tokenizer has neither a padding nor an end-of-sequence token')
    tokenizer.model_max_length = 10**9  # texts are cut to seq_len here, so its warning would mislead
    return tokenizer


def load_base(spec: RunSpec, device: torch.device, options: dict[str, Any], exact: bool = False) -> nn.Module:
    """The untouched base on `device`: in float32 if it is to be trained, else in `spec.dtype`, quantized as asked.

    With `exact` it is not quantized, whatever the spec says.

    A new task head takes its random weights from torch's global generator.
    """
    import torch
    import transformers

    auto = getattr(transformers, spec.task.auto_class)
    dtype = torch.float32 if spec.method.trains_base else getattr(torch, spec.dtype)
    extra: dict[str, Any] = {}
    quantized = spec.quantization != "none" and not exact
    if quantized:
        extra = {"quantization_config": _quantization(spec, options), "device_map": {"": device}}
    model = _pretrained(spec.model, spec.revision, auto.from_pretrained, dtype=dtype, **options, **extra)
    if not quantized:
        model.to(device)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 repacks 4-bit weights at the first evaluation, rounding their scales to bfloat16;
            # training on afterwards reads the repacked bytes as if they were not, and learns from noise.
            module.support_avx512bf16_for_cpu = False
    model.config.pad_token_id = load_tokenizer(spec.model, spec.revision).pad_token_id  # a classifier looks for it
    model.config.use_cache = False
    return model


def skeleton(spec: RunSpec, options: dict[str, Any]) -> nn.Module:
    """The base without weights (meta device), from its config alone: for counting, quick whatever the size."""
    import torch
    import transformers

    config = _pretrained(spec.model, spec.revision, transformers.AutoConfig.from_pretrained, **options)
    with torch.device("meta"):
        return getattr(transformers, spec.task.auto_class).from_config(config)


def fingerprint(spec: RunSpec) -> dict[str, str]:
    """Which weights these are: the Hub's commit, or SHA-256 of each of a local folder's weight files."""
    from transformers.utils import cached_file

    from lorabench.record import file_digest

    source = resolve(spec.model)
    if not Path(source).is_dir():  # the cache keeps each commit's files in a folder of that name
        return {"model_commit": Path(str(cached_file(source, "config.json", revision=spec.revision))).parent.name}
    files = sorted(file for pattern in WEIGHT_FILES for file in Path(source).glob(pattern))
    return {"model_sha256": ",".join(file_digest(file) for file in files)}


def max_length(model: nn.Module) -> int | None:
    """The longest input that the model's position embeddings allow; None where there is no such limit."""
    longest = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa counts positions from there
    return longest


def check_length(spec: RunSpec, longest: int | None) -> None:
    """InputError where a run's examples, with what its method puts in front of them, are too long for the model."""
    virtual = spec.method.num_virtual_tokens
    if longest is not None and spec.seq_len + virtual > longest:
        also = f", with the method's {virtual} virtual tokens," if virtual else ""
        limit = f"at most {longest}, the longest that {spec.model} takes"
        raise InputError(f"seq_len = {spec.seq_len}: must{also} be {limit}")


def new_heads(model: nn.Module) -> list[str]:
    """The head modules that a classification model puts on the pretrained base."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    prefix = model.base_model_prefix
    return [name for name, module in model.named_children() if name != prefix and list(module.parameters())]


def untie(model: nn.Module) -> None:
    """Give an output matrix that is tied to the input embedding a copy of its own."""
    from torch import nn

    output = model.get_output_embeddings()
    if output is not None and output.weight is model.get_input_embeddings().weight:
        output.weight = nn.Parameter(output.weight.detach().clone())
        model.config.tie_word_embeddings = False


def as_linear(model: nn.Module) -> None:
    """Replace each of GPT-2's Conv1D layers by the linear layer that computes the same."""
    from torch import nn

    for name, module in list(model.named_modules()):
        if is_conv1d(module):
            inputs, outputs = module.weight.shape
            linear = nn.Linear(inputs, outputs, device="meta")
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
            linear.bias = module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)


def reads_last_token(model: nn.Module) -> bool:
    """Whether a classifier's head reads the last token that is no padding, as transformers' decoders have it."""
    return "score" in new_heads(model)


def is_linear_layer(module: nn.Module) -> bool:
    """A linear layer, quantized or not, or GPT-2's Conv1D."""
    from torch import nn

    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def weight_changes(
    model: nn.Module, base: nn.Module, prefix: str = "", names: Collection[str] | None = None
) -> Iterator[Update]:
    """ΔW of every parameter, or of those in `names`: dense, on the CPU, in (out, in) orientation; vectors as (n, 1)."""
    for name in names if names is not None else [name for name, _ in model.named_parameters()]:
        parameter, original = model.get_parameter(name), base.get_parameter(name).detach()
        delta = parameter.detach().float() - original.to(parameter.device).float()
        yield Update(
            parameter=prefix + name,
            B=_as_matrix(delta, model.get_submodule(name.rpartition(".")[0])).cpu(),
            base_norm=float(original.float().norm()),
            precision=str(parameter.dtype).removeprefix("torch."),
        )


def add_update(model: nn.Module, update: Update) -> None:
    """W0 + ΔW, in place, on a model whose weights are not quantized."""
    import torch

    module = model.get_submodule(update.parameter.rpartition(".")[0])
    if module is model.get_output_embeddings():
        untie(model)  # its input side has an update of its own, or none
    parameter = model.get_parameter(update.parameter)
    delta = update.dense().to(parameter.device)
    if is_transposed(module) and parameter.ndim > 1:
        delta = delta.T
    with torch.no_grad():
        parameter += delta.reshape(parameter.shape).to(parameter.dtype)


def save_peft(model: nn.Module, folder: Path) -> None:
    """Save an adapter in PEFT's format, the same bytes for the same adapter: PEFT writes its sets in any order."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a model card of placeholders
    file = folder / "adapter_config.json"
    config = {k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def weight_norm(module: nn.Module) -> float:
    """‖W0‖_F of a linear layer, of its dequantized weight where it is quantized."""
    return float(dequantized(module).float().norm())


def dequantized(module: nn.Module) -> Tensor:
    """W0 of a linear layer, out of its 4-bit or 8-bit form where it has one."""
    weight = module.weight
    match type(weight).__name__:
        case "Params4bit":
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, weight.quant_state)
        case "Int8Params":  # PEFT's own helper moves the weight, after which the layer's forward pass fails
            from bitsandbytes.functional import int8_vectorwise_dequant

            scales = module.state.SCB if module.state.SCB is not None else weight.SCB
            return int8_vectorwise_dequant(weight.data, scales.to(weight.device))
    return weight.detach()


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores its weight as (in, out): Conv1D, and an embedding, whose input is a one-hot token."""
    from torch import nn

    return is_conv1d(module) or isinstance(module, nn.Embedding)


def _as_matrix(delta: Tensor, module: nn.Module) -> Tensor:
    if delta.ndim == 1:
        return delta[:, None]
    return (delta.T if is_transposed(module) else delta.flatten(1)).contiguous()


def _quantization(spec: RunSpec, options: dict[str, Any]) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    from lorabench.targets import head_modules

    skipped = head_modules(skeleton(spec, options))  # a new head is trained, and a language-model head stays exact
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
        llm_int8_skip_modules=skipped,
    )


def _pretrained(source: str, revision: str | None, load: Any, **arguments: Any) -> Any:
    path = resolve(source)
    local = Path(path).is_dir()
    place = {"local_files_only": local or _offline(), "revision": None if local else revision}
    try:
        return load(path, **place, **arguments)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f'model = "{source}": neither a local folder nor a Hub model that loads: {reason}') from error


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
