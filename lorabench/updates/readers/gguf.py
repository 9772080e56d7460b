"""llama.cpp (`convert_lora_to_gguf`): one GGUF file of `TENSOR.weight.lora_a` (r, in) and `.lora_b` (out, r).

ΔW = s B A with s = α / r, α of `adapter.lora.alpha`; experts are stacked, a (E, r, in) and b (E, out, r): a layer each,
`MODULE[e]`; the input embedding's a is (vocabulary, r). Names are put back to those of the Hugging Face model by the
`gguf` package's table: to the one that the base has, else to the usual (`model.layers.N.self_attn.q_proj`); where that
is not certain, they stay llama.cpp's. For Llama-like architectures llama.cpp has the rows of q and k in the order of
its rotary embedding. To undo that takes the number of heads, which the base's `config.json` tells; without it, and for
architectures that are not known here, these layers keep llama.cpp's names and order: their singular values and right
singular vectors are the same, left ones not.

Source: llama.cpp, `convert_lora_to_gguf.py`, and `LlamaModel.permute` of `conversion/llama.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.config.quote import clip, counted
from lorabench.updates.readers._entry import Found, Source, read_json
from lorabench.updates.readers._experts import Kept
from lorabench.updates.readers._factors import Form, Layer, Scale, by_convention, found, plain, rank_of, stems
from lorabench.updates.readers._gguf_file import GGUF_SUFFIX, GGUFFile
from lorabench.updates.readers._peft_config import is_number
from lorabench.updates.weightfile import some

A_END, B_END = ".lora_a", ".lora_b"
ASSUMED = "no adapter.lora.alpha in the file: the scale is assumed to be 1 (--alpha tells α, and s = α / r)"
PERMUTED = ("llama", "llama-embed", "mistral3", "granite", "granitemoe", "granitehybrid", "arcee", "smollm3", "minicpm",
            "deci", "olmo", "xverse", "bailingmoe", "llada")  # fmt: skip
"""Architectures of which llama.cpp's conversion permutes the rows of q and k."""
PLAIN = ("llama4", "apertus", "afmoe", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3",
         "starcoder2", "gpt2", "olmo2", "olmoe", "seed_oss", "smallthinker", "llada-moe")  # fmt: skip
"""Those of which it leaves all rows as they are. Of any other, rows of q, k and a fused qkv are not known."""
_ROTATED = re.compile(r"blk\.\d+\.attn_(?P<which>q|k|qkv)")
_BY_BLOCK = ("block_configs", "num_key_value_heads_per_layer")
"""Keys of a configuration whose numbers of heads differ from block to block (DeciLM)."""
_BLOCK = re.compile(r"(?<=^blk\.)\d+(?=\.)")
_USUAL = re.compile(
    r"model\.layers\.0\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj|mlp\.experts\.(?:gate|up|down)_proj)|"
    r"model\.embed_tokens|lm_head|transformer\.h\.0\.(?:attn\.c_(?:attn|proj)|mlp\.c_(?:fc|proj))|transformer\.wte"
)
"""Names in Llama-like models and in GPT-2."""


def find(source: Source) -> Found | None:
    """The adapter of one GGUF file; None where there is none. InputError for a GGUF file of a model."""
    files = [GGUFFile(file) for file in source.files(GGUF_SUFFIX)]
    own = [file for file in files if any(name.endswith(A_END) for name in file.names)]
    if files and not own and source.path.is_file():
        raise InputError(f"{source.path}: holds no LoRA factors (….lora_a), but {some(files[0].names)}: a model?")
    if len(own) > 1:
        raise InputError(f"{source.path}: several adapters: name one of {some([file.file.name for file in own])}")
    return _found(own[0], source) if own else None


def _found(file: GGUFFile, source: Source) -> Found:
    modules = stems(file, A_END)
    architecture = str(file.settings.get("general.architecture", ""))
    heads = _heads(source, architecture) if architecture in PERMUTED else {}
    kept = Kept(file)
    layers: list[Layer] = []
    in_their_order: list[str] = []
    for stem in modules:
        name = stem.removesuffix(".weight")
        rotated = _ROTATED.fullmatch(name) if architecture not in PLAIN else None
        count = heads.get(rotated["which"]) if rotated else None
        if rotated and count is None:
            in_their_order.append(name)
        module = name if rotated and count is None else _module(name, architecture, source)
        layers += _layers(kept, stem, module, _scale(file, stem, source), count)
    notes = list(_notes(file, architecture, in_their_order))
    used = {stem + end for stem in modules for end in (A_END, B_END)}
    return found("gguf", layers, assumed=ASSUMED, notes=notes, left_out={*file.names} - used)


def _layers(tensors: Kept, stem: str, module: str, scale: Scale, heads: int | None) -> Iterator[Layer]:
    names = {"B": stem + B_END, "A": stem + A_END}
    shape = tensors.shape(names["A"])
    form: Form = partial(unpermuted, heads=heads) if heads else _embedding if stem.startswith("token_embd.") else plain
    if len(shape) != 3:
        yield Layer(tensors=tensors, parameter=f"{module}.weight", names=names, scale=scale, form=form)
        return
    for index in range(shape[0]):
        one = partial(_expert, index=index)
        yield Layer(tensors=tensors, parameter=f"{module}[{index}].weight", names=names, scale=scale, form=one)


def unpermuted(B: Tensor, A: Tensor, *, heads: int) -> tuple[Tensor, Tensor]:
    """Rows 2 i and 2 i + 1 of a head of width d, rotated together by llama.cpp, are i and i + d / 2 of transformers."""
    return B.reshape(heads, -1, 2, B.shape[1]).transpose(1, 2).reshape(B.shape), A


def _expert(B: Tensor, A: Tensor, *, index: int) -> tuple[Tensor, Tensor]:
    return B[index], A[index]


def _embedding(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    return B, A.transpose(0, 1)


def _scale(file: GGUFFile, stem: str, source: Source) -> Scale:
    name = stem + A_END
    rank = rank_of(file, name, axis=1 if len(file.shape(name)) == 3 or stem.startswith("token_embd.") else 0)
    alpha = file.settings.get("adapter.lora.alpha")
    if alpha is None or alpha == 0:
        return by_convention(source, rank)
    if not is_number(alpha):
        raise InputError(f"{file.file}: adapter.lora.alpha = {clip(alpha)}: must be a number")
    return Scale(value=alpha / rank, source="file")


def _heads(source: Source, architecture: str) -> dict[str, int]:
    """The number of heads of q and of k, by the base's configuration; empty where there is none, or not one number.

    Of grouped keys of XVERSE, llama.cpp permutes others than those of a head.
    """
    if source.base is None:
        return {}
    file = (source.base if source.base.is_dir() else source.base.parent) / "config.json"
    told: dict[str, Any] = read_json(file) if file.is_file() else {}
    told = told["text_config"] if isinstance(told.get("text_config"), dict) else told
    q, k = told.get("num_attention_heads"), told.get("num_key_value_heads")
    k = q if k is None else k
    if not isinstance(q, int) or not isinstance(k, int) or min(q, k) <= 0:
        return {}
    return {} if told.keys() & {*_BY_BLOCK} or (architecture == "xverse" and q != k) else {"q": q, "k": k}


def _module(name: str, architecture: str, source: Source) -> str:
    """The module in the Hugging Face model; llama.cpp's own name where that is not certain."""
    block = _BLOCK.search(name)
    known = _names(architecture).get(_BLOCK.sub("0", name), [])
    candidates = [re.sub(r"\.0\.", f".{block[0]}.", each, count=1) if block else each for each in known]
    if source.weights is not None:
        stored = {*source.weights.names}
        there = [each for each in candidates if f"{each}.weight" in stored]
        return there[0] if len(there) == 1 else name
    usual = [each for each, first in zip(candidates, known, strict=True) if _USUAL.fullmatch(first)]
    usual = [each for each in usual if each.startswith("transformer.") == (architecture == "gpt2") or each == "lm_head"]
    return usual[0] if len(usual) == 1 else name


@cache
def _names(architecture: str) -> dict[str, list[str]]:
    """llama.cpp's name of a module of block 0, or of none -> names that it has in models, by the `gguf` package."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        return {}
    names: dict[str, list[str]] = {}
    for theirs, (_, ours) in gguf.get_tensor_name_map(kinds[architecture], 1).mapping.items():
        names.setdefault(ours, []).append(theirs)
    return names


def _notes(file: GGUFFile, architecture: str, in_their_order: list[str]) -> Iterator[str]:
    if in_their_order and architecture in PERMUTED:
        yield (
            f"rows of q and k in {counted(len(in_their_order), 'layer')} are in llama.cpp's rotary order, so that left "
            "singular vectors are not those of other formats: --base, with its config.json, tells the heads"
        )
    if architecture not in PERMUTED + PLAIN:
        yield f"architecture {clip(architecture) or 'unknown'}: rows and names are as llama.cpp has them"
    if file.settings.get("adapter.alora.invocation_tokens"):
        yield "aLoRA: ΔW acts on the tokens after its invocation alone"
