"""Base models: load and quantize (Hub id, local folder, `builtin:NAME`), and what they are built of."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.decode import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

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


def local_files(source: str, revision: str | None = None) -> Path:
    """The folder that holds a base's files: its own, or the one in the Hub's cache. InputError where there is none."""
    path = Path(resolve(source))
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f'model = "{source}": its files are not on this machine: {reason}') from None


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


def skeleton(spec: RunSpec, options: dict[str, Any], device: torch.device | None = None) -> nn.Module:
    """The base without weights (meta device), from its config alone: for counting, quick whatever the size.

    On any other `device` its weights are random.
    """
    import torch
    import transformers

    config = _pretrained(spec.model, spec.revision, transformers.AutoConfig.from_pretrained, **options)
    with device or torch.device("meta"):
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


def reads_last_token(model: nn.Module) -> bool:
    """Whether a classifier's head reads the last token that is no padding, as transformers' decoders have it."""
    return "score" in new_heads(model)


def save_peft(model: nn.Module, folder: Path) -> None:
    """Save an adapter in PEFT's format, the same bytes for the same adapter: PEFT writes its sets in any order."""
    model.save_pretrained(folder, save_embedding_layers=False)  # else the base's own go in, beside their factors
    (folder / "README.md").unlink(missing_ok=True)  # a model card of placeholders
    sort_config(folder)


def sort_config(folder: Path) -> None:
    """Put the keys and sets of PEFT's configuration in order."""
    file = folder / "adapter_config.json"
    config = {k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


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
