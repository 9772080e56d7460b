"""Base models: load and quantize (Hub id, local folder, `builtin:NAME`), and what they are built of."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from lorabench.config.decode import InputError, show
from lorabench.config.quote import clip, show_path
from lorabench.data.dataset import BUILTIN as BUILTIN
from lorabench.data.image_folder import VISION
from lorabench.models import denoisers

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorabench.spec.run_spec import RunSpec

WEIGHT_FILES = ("*.safetensors", "*.bin")
_REPORTED: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def resolve(source: str) -> str:
    """What transformers is given for `source`: a local path or a Hub id. InputError for a missing folder."""
    if source.startswith("builtin:"):
        folder = BUILTIN / source.removeprefix("builtin:")
        if not os.path.exists(folder / "config.json") and not denoisers.is_pipeline(folder):
            raise InputError(f"model = {show(source)}: no such built-in model. Choices: {', '.join(builtin_models())}")
        return str(folder)
    folder = Path(os.path.expanduser(source))
    if os.path.isdir(folder):  # False also of a name that no file system takes
        if not (folder / "config.json").exists() and not denoisers.is_pipeline(folder):
            raise InputError(f'model = "{show_path(source)}": the folder has neither config.json nor {denoisers.INDEX}')
        return str(folder)
    if os.path.exists(folder) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f'model = "{show_path(source)}": no such folder')
    return source


@cache
def builtin_models() -> tuple[str, ...]:
    return tuple(
        sorted(
            f"builtin:{path.parent.name}"
            for kind in ("config.json", denoisers.INDEX)
            for path in BUILTIN.glob(f"*/{kind}")
        )
    )


def local_files(source: str, revision: str | None = None) -> Path:
    """The folder that holds a base's files: its own, or the one in the Hub's cache. InputError where there is none."""
    path = Path(resolve(source))
    if path.is_dir():
        return denoisers.denoiser_folder(path, source) if denoisers.is_pipeline(path) else path
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f'model = "{show_path(source)}": its files are not on this machine: {reason}') from None
    return denoisers.denoiser_folder(found, source) if denoisers.is_pipeline(found) else found


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The model's tokenizer; where it has no padding token, padding is the end-of-sequence token."""
    from transformers import AutoTokenizer

    tokenizer = _pretrained(source, revision, AutoTokenizer.from_pretrained)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(
            f'model = "{show_path(source)}": its tokenizer has neither a padding nor an end-of-sequence token'
        )
    tokenizer.model_max_length = 10**9  # texts are cut to seq_len here, so its warning would mislead
    return tokenizer


def load_image_processor(source: str, revision: str | None = None) -> Any:
    """The model's image processor. InputError where it has none, or a library that it needs is missing."""
    try:
        from transformers import AutoImageProcessor

        return _pretrained(source, revision, AutoImageProcessor.from_pretrained)
    except ImportError:
        raise InputError(f'model = "{show_path(source)}": its image processor needs {VISION}') from None


def load_base(spec: RunSpec, device: torch.device, options: dict[str, Any], exact: bool = False) -> nn.Module:
    """The untouched base on `device`: in float32 if it is to be trained, else in `spec.dtype`, quantized as asked.

    With `exact` it is not quantized, whatever the spec says.

    A new task head takes its random weights from torch's global generator. What else the files lack does too; `drawn`
    of the model holds all of it, by name. InputError where that is most of the base.
    """
    import torch

    dtype = torch.float32 if spec.method.trains_base else getattr(torch, spec.dtype)
    if denoises(spec):
        return _load_denoiser(spec, device, dtype, exact)
    import transformers

    auto = getattr(transformers, spec.task.auto_class)
    extra: dict[str, Any] = {}
    quantized = spec.quantization != "none" and not exact
    if quantized:
        extra = {"quantization_config": _quantization(spec, options), "device_map": {"": device}}
    extra |= _REPORTED | options
    model, report = _pretrained(spec.model, spec.revision, auto.from_pretrained, dtype=dtype, **extra)
    missing = check_files(spec, model, report)
    model.drawn = {name: model.get_parameter(name).detach().cpu().clone() for name in missing}
    if not quantized:
        model.to(device)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False  # a T5's encoder and decoder have copies of their own
    _never_repack(model)
    if spec.task.unit == "tokens":
        model.config.pad_token_id = padding(spec, model)  # a classifier looks for it
    return model


def _never_repack(model: nn.Module) -> None:
    """bitsandbytes 0.50 repacks 4-bit weights at the first evaluation, rounding their scales to bfloat16; training on
    afterwards reads the repacked bytes as if they were not, and learns from noise."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def denoises(spec: RunSpec) -> bool:
    """Whether the base is the denoiser of a pipeline of diffusers."""
    return spec.task.auto_class == denoisers.AUTO_CLASS


def _load_denoiser(spec: RunSpec, device: torch.device, dtype: torch.dtype, exact: bool) -> nn.Module:
    model, report = denoisers.load(pipeline_folder(spec.model, spec.revision), spec.model, dtype)
    check_files(spec, model, report)
    model.drawn = {}
    if spec.quantization != "none" and not exact:
        denoisers.quantize(model, spec.quantization, dtype)
        _never_repack(model)
    return model.to(device)


def pipeline_folder(source: str, revision: str | None) -> Path:
    """The folder of a pipeline's files, out of the Hub's cache where it is there, else from the Hub."""
    path = Path(resolve(source))
    if path.is_dir():
        if not denoisers.is_pipeline(path):
            says = f"the folder has no {denoisers.INDEX}, as diffusers saves pipelines"
            raise InputError(f'model = "{show_path(source)}": {says}')
        return path
    return denoisers.downloaded(source, revision, _offline())


def skeleton(spec: RunSpec, options: dict[str, Any], device: torch.device | None = None) -> nn.Module:
    """The base without weights (meta device), from its config alone: for counting, quick whatever the size.

    On any other `device` its weights are random.
    """
    import torch

    return from_config(spec, read_config(spec, options), device or torch.device("meta"))


def read_config(spec: RunSpec, options: dict[str, Any]) -> Any:
    """The base's configuration."""
    if denoises(spec):
        return denoisers.read_config(pipeline_folder(spec.model, spec.revision), spec.model)
    import transformers

    return _pretrained(spec.model, spec.revision, transformers.AutoConfig.from_pretrained, **options)


def num_blocks(source: str) -> int:
    """Blocks of a model of transformers, by its configuration."""
    import transformers

    return int(_pretrained(source, None, transformers.AutoConfig.from_pretrained).num_hidden_layers)


def sequence_end(source: str, revision: str | None) -> int | None:
    """The token by whose place an encoder-decoder classifies, in transformers; None of other models."""
    import transformers

    config = _pretrained(source, revision, transformers.AutoConfig.from_pretrained)
    return config.eos_token_id if config.is_encoder_decoder else None


def from_config(spec: RunSpec, config: Any, device: torch.device) -> nn.Module:
    """A model of random weights. InputError where there is none of its kind for the task."""
    if denoises(spec):
        return denoisers.from_config(pipeline_folder(spec.model, spec.revision), spec.model, config, device)
    import transformers

    auto = getattr(transformers, spec.task.auto_class)
    try:
        with device:
            model: nn.Module = auto.from_config(config)
    except ValueError as error:
        if type(config) in auto._model_mapping:
            raise
        raise InputError(
            f'model = "{show_path(spec.model)}": a {config.model_type} cannot do task.name = "{spec.task.name}": '
            f"transformers has no {spec.task.auto_class} of it"
        ) from error
    if "labels" in spec.task.sequences:
        _check_decoder(spec, config)
    if any("BatchNorm" in type(module).__name__ for module in model.modules()):
        raise InputError(
            f'model = "{show_path(spec.model)}": {type(model).__name__} normalizes by batch, and training changes its '
            "running means beside all weights; use a model with layer norms: ViT, DeiT, Swin, ConvNeXt, DINOv2"
        )
    return model


def _check_decoder(spec: RunSpec, config: Any) -> None:
    """InputError where a model cannot write to what it reads by a decoder of its own."""
    what = f'model = "{show_path(spec.model)}"'
    if not config.is_encoder_decoder:
        raise InputError(f'{what}: a {config.model_type} has no encoder, as task.name = "{spec.task.name}" needs it')
    if getattr(config, "decoder_start_token_id", None) is None:
        raise InputError(f"{what}: its config.json has no decoder_start_token_id, by which a decoder begins")


def from_files(spec: RunSpec, options: dict[str, Any]) -> nn.Module:
    """The base without weights (meta device), and in `drawn` what its files lack; nothing where they are not here.

    Reads no more of the files than what is in them. InputError as `load_base` has it.
    """
    base: Any = skeleton(spec, options)
    base.drawn = {}
    if denoises(spec):  # whose files lack nothing that is drawn: that would be refused when they are loaded
        return base
    import transformers

    try:
        folder = local_files(spec.model, spec.revision)
    except InputError:
        return base
    if any(True for pattern in WEIGHT_FILES for _ in folder.glob(pattern)):
        auto, arguments = getattr(transformers, spec.task.auto_class), {"device_map": "meta"} | _REPORTED | options
        with _no_progress():
            base, report = _pretrained(spec.model, spec.revision, auto.from_pretrained, **arguments)
        base.drawn = dict.fromkeys(check_files(spec, base, report))
    return base


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    """Without transformers' bar, where nothing is loaded that takes its time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_files(spec: RunSpec, model: nn.Module, report: dict[str, Any]) -> list[str]:
    """The parameters that a base's files lack, by transformers' report. InputError where they are not this model's.

    That is so where they lack most of the base, or have it in other shapes; a new task head apart, whose shape is the
    data's.
    """
    heads = _below(new_heads(model))
    shapes = {name: (tuple(there), tuple(here)) for name, there, here in report["mismatched_keys"]}
    other = next((name for name in shapes if not name.startswith(heads)), None)
    if other:
        there, here = shapes[other]
        asked = f"{other} as {there}, and its config.json asks for {here}"
        raise InputError(f'model = "{show_path(spec.model)}": its files hold {asked}')
    parameters = {name: p.numel() for name, p in model.named_parameters() if not name.startswith(heads)}
    missing = [name for name, _ in model.named_parameters() if name in report["missing_keys"] or name in shapes]
    lacking = [name for name in missing if name in parameters]
    if 2 * sum(parameters[name] for name in lacking) > sum(parameters.values()):
        found = sorted(report["unexpected_keys"])
        instead = f"; what they hold is called {show(found[0])} …" if found else ""
        raise InputError(
            f'model = "{show_path(spec.model)}": its files lack {len(lacking)} of the {len(parameters)} parameters of '
            f"{type(model).__name__}, such as {lacking[0]}{instead}: it would be trained from random numbers"
        )
    return missing


def drawn_modules(model: nn.Module) -> list[str]:
    """The modules with weights that the base's files lack, a new task head's apart: random, and the same at each load
    under one seed only, so that what is saved has to hold them."""
    heads = _below(new_heads(model))
    names = [name for name in getattr(model, "drawn", ()) if not name.startswith(heads)]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def fingerprint(spec: RunSpec) -> dict[str, str]:
    """Which weights these are: the Hub's commit, or SHA-256 of each of a local folder's weight files."""
    from lorabench.config.digests import file_digest

    source = resolve(spec.model)
    if denoises(spec):
        folder = pipeline_folder(spec.model, spec.revision)
        if not Path(source).is_dir():
            return {"model_commit": folder.name}
        files = sorted([*denoisers.denoiser_folder(folder, spec.model).glob("*.*"), *folder.glob("scheduler/*.json")])
        return {"model_sha256": ",".join(file_digest(file) for file in files)}
    from transformers.utils import cached_file

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
    for task in (task for stage in spec.stages for task in (stage, *stage.others.values())):
        read, *written = task.longest(spec.seq_len)
        keys = {"max_target": max(written, default=0)}
        keys |= {"generate.max_new_tokens": task.generation.max_new_tokens} if task.generation else {}
        before = {} if written else {f"seq_len = {read}": read}
        before |= {f"{virtual} virtual tokens": virtual} if virtual else {}
        for key, new in keys.items():
            if longest is not None and new and sum(before.values()) + new > longest:
                whole = f", with {' and '.join(before)}," if before else ""
                limit = f"at most {longest}, the longest that {spec.model} takes"
                raise InputError(f"task.{key} = {new}: must{whole} be {limit}")


def padding(spec: RunSpec, model: nn.Module) -> int:
    """The tokenizer's padding token. InputError where the model has no embedding of it."""
    number, token, size = _padding_token(spec.model, spec.revision)
    rows = model.get_input_embeddings().weight.shape[0]
    if number >= rows:
        raise InputError(
            f'model = "{show_path(spec.model)}": its tokenizer of {size} tokens pads with '
            f"{show(token)}, number {number}, and the model has embeddings of {rows}: "
            f"0 to {rows - 1}"
        )
    return number


@lru_cache(maxsize=16)
def _padding_token(source: str, revision: str | None) -> tuple[int, str, int]:
    """Its number, itself, and how many tokens the tokenizer has: read once for all loads of a base."""
    tokenizer = load_tokenizer(source, revision)
    return int(tokenizer.pad_token_id), tokenizer.pad_token, len(tokenizer)


def new_heads(model: nn.Module) -> list[str]:
    """The head modules that a classification model puts on the pretrained base."""
    if not type(model).__name__.endswith(("ForSequenceClassification", "ForImageClassification")):
        return []
    prefix = model.base_model_prefix
    return [name for name, module in model.named_children() if name != prefix and list(module.parameters())]


def _below(modules: list[str]) -> tuple[str, ...]:
    """What the names begin with of all that lies in the modules."""
    return tuple(f"{name}." for name in modules)


def reads_images(model: Any) -> bool:
    """Whether a model's input are pixels, or latents (n, channels, height, width), and no tokens."""
    return getattr(model, "main_input_name", "") == "pixel_values" or denoisers.is_denoiser(model)


def task_type(model: nn.Module) -> str | None:
    """What PEFT calls what the model does; it has no word for telling images apart, and wraps such a model as it is."""
    if reads_images(model):
        return None
    if new_heads(model):
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def reads_last_token(model: nn.Module) -> bool:
    """Whether a classifier's head reads the last token that is no padding, as transformers' decoders have it."""
    return "score" in new_heads(model)


def save_peft(model: nn.Module, folder: Path) -> None:
    """Save an adapter in PEFT's format, the same bytes for the same adapter: PEFT writes its sets in any order."""
    model.create_or_update_model_card = _no_card  # of placeholders alone, for which it compiles a template each time
    try:
        model.save_pretrained(folder, save_embedding_layers=False)  # else the base's own go in, beside their factors
    finally:
        del model.create_or_update_model_card
    sort_config(folder)
    if denoisers.is_denoiser(model):
        denoisers.save_for_pipelines(model, folder)


def _no_card(_folder: str) -> None:
    """Instead of PEFT's own."""


def sort_config(folder: Path) -> None:
    """Put the keys and sets of PEFT's configuration in order."""
    file = folder / "adapter_config.json"
    config = {k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _quantization(spec: RunSpec, options: dict[str, Any]) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    from lorabench.models.targets import head_modules

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
    if local and denoisers.is_pipeline(Path(path)):
        what = 'is a pipeline of diffusers, whose denoiser task.name = "denoising" trains'
        raise InputError(f'model = "{show_path(source)}": {what}')
    if local:
        denoisers.check_whole(Path(path), source)
    place = {"local_files_only": local or _offline(), "revision": None if local else revision}
    try:
        return load(path, **place, **arguments)
    except (RuntimeError, EOFError, UnpicklingError) as error:  # a file of torch's own, which is torn
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise InputError(f'model = "{show_path(source)}": its *.bin does not load: {clip(error)}') from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f'model = "{show_path(source)}": neither a local folder nor a Hub model that loads: {reason}'
        ) from error


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
