"""A model's weights on disk, by parameter name, one at a time; no model is built, and never is all of it in memory.

A folder as `save_pretrained` writes it (one file, or shards with an index), or one file.
Shapes: (out, in), as in `lorabench.updates.update`.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.config.quote import clip
from lorabench.updates.other_names import diffusers_name
from lorabench.updates.tensorfile import SUFFIXES, TORCH_SUFFIXES, Tensors, check_regular, open_tensors, read_json

CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
"""`model_type` of the models with transformers' Conv1D layers, whose weights are stored as (in, out)."""
TRANSPOSED_STACKS = ("gpt_oss", "openai_privacy_filter")
"""`model_type` of the models whose classes say that their stacked experts are stored as (experts, in, out)."""
CONV1D_NAMES = ("c_attn", "q_attn", "c_proj", "c_fc")
_NAME_BYTES = 255
"""Of a file, on Linux and elsewhere."""
INDEX_BYTES = 64 * 2**20
"""That of a model of some hundred thousand tensors is smaller."""
_OF_TRAINING = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state")
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|embed_tokens_per_layer|wte|wpe|shared|embed_in|embed_positions|tok_embeddings|"
    r"tokens_embed|positions_embed|relative_attention_bias|"
    r"(?!patch)(?:\w+_)?embeddings?)\.weight$"
)
"""Names of embeddings in transformers, torchtune and loralib's examples."""
_INPUT = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|shared)\.weight$")
_OUTPUT = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|proj_out|generator_lm_head|(?:lm_head|predictions)\.decoder)\.weight$"
)
"""Names of the two matrices that may be tied, in transformers."""
_INNER = re.compile(r"^(?:model\.|language_model\.)+")
"""What transformers puts before the layers of a text model."""
_FLAT = re.compile(r"(?:lora_unet|lora_te\d?|lora_transformer|lycoris)_([^.]+)\.weight")
_LLAMA_CPP = re.compile(r"blk\.\d+\.")


class WeightFiles:
    """The weights of one model. InputError where there are none, or the files are damaged.

    Opening reads headers only; `read` reads one weight. Of stacked experts, (experts, out, in), each is a weight of its
    own, `STACK[3].weight`; Llama 4's, (experts, in, out), are taken as they are stored, as in runs.
    """

    def __init__(self, path: Path | str, files: Iterable[Tensors] | None = None):
        """`files`: those of the path, where they are open already."""
        self.path = Path(path)
        self._files: dict[str, Tensors] = {}
        for tensors in map(open_tensors, weight_files(self.path)) if files is None else files:
            self._files |= dict.fromkeys(tensors.names, tensors)
        if not self._files:
            raise InputError(f"{self.path}: holds no weights")
        shapes = {name: tensors.shape(name) for name, tensors in self._files.items() if "expert" in name.lower()}
        stacks = {name: shape[0] for name, shape in shapes.items() if len(shape) == 3 and 0 not in shape}
        self._experts = {f"{name}[{e}].weight": (name, e) for name, count in stacks.items() for e in range(count)}
        self._last: tuple[str, Tensor] | None = None
        """The stack that was read last."""

    @property
    def names(self) -> list[str]:
        """Sorted, as they are stored, but for experts."""
        stacks = {stack for stack, _ in self._experts.values()}
        return sorted([*(self._files.keys() - stacks), *self._experts])

    def find(self, parameter: str) -> str | None:
        """The stored name of a parameter; None where there is none, or more than one could be meant.

        Models with and without a head, and wrappers, put another prefix before the same name (`model.`, `bert.`,
        `base_model.model.`): the name itself, else the only one that ends as it does or as which it ends. What the
        two differ by must be a wrapper, not a block (`layers.0.`). Of a name of kohya's (`lora_unet_…`), which has `_`
        for `.`, the one that is so written, else the only one that ends so. An output matrix that is tied to the input
        embedding, and so is not stored, is found by its own name. Last, what diffusers calls it where that is another.
        """
        if parameter in self._files or parameter in self._experts:
            return parameter
        if candidates := self._candidates(parameter):
            return candidates[0] if len(candidates) == 1 else None
        other = diffusers_name(parameter)
        if other is not None:
            return self.find(other)
        return parameter if _OUTPUT.search(parameter) and self._tied_embedding else None

    def shape(self, parameter: str) -> tuple[int, int]:
        """(out, in) of a parameter, from the header: an embedding is (width, vocabulary), a vector (n, 1), and a
        convolution (out, in · kernel)."""
        name = self._name(parameter)
        stored = self.stored_shape(name)
        if len(stored) < 2:
            return math.prod(stored), 1
        return (stored[1], stored[0]) if self._is_transposed(name) else (stored[0], math.prod(stored[1:]))

    def stored_shape(self, parameter: str) -> tuple[int, ...]:
        """As it is in the file."""
        name = self._name(parameter)
        tensors, stored = self._place(name)
        return tensors.shape(stored)[1 if name in self._experts else 0 :]

    def dtype(self, parameter: str) -> str:
        """As stored: `bfloat16`."""
        tensors, name = self._place(self._name(parameter))
        return tensors.dtype(name)

    def read(self, parameter: str) -> Tensor:
        """(out, in) in float32 (float64 stays). InputError where it is not there, quantized, or holds NaN or Inf."""
        name = self._name(parameter)
        shape = self.shape(name)
        tensor = self._expert(*self._experts[name]) if name in self._experts else self._stored(name)
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return tensor.T if self._is_transposed(name) else tensor.reshape(shape)

    def _stored(self, name: str) -> Tensor:
        tensors, stored = self._place(name)
        return tensors.read(stored)

    def _expert(self, stack: str, index: int) -> Tensor:
        if self._last is None or self._last[0] != stack:
            self._last = None  # before the next takes as much memory
            self._last = stack, self._stored(stack)
        return self._last[1][index]

    @cached_property
    def has_transposed_stacks(self) -> bool:
        """Whether stacked experts are stored as (experts, in, out), by `config.json`."""
        return self._config.get("model_type") in TRANSPOSED_STACKS

    @cached_property
    def has_conv1d(self) -> bool:
        """Whether the attention's and feed-forward's weights are stored as (in, out): by `config.json`, else by their
        shapes."""
        if self._config:
            return self._config.get("model_type") in CONV1D_TYPES
        fused = [name for name in self._files if name.endswith("attn.c_attn.weight")]
        shapes = [self._files[name].shape(name) for name in fused]
        return any(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in shapes)

    def _place(self, name: str) -> tuple[Tensors, str]:
        """The file of what `find` gave, and its name there: a tied output matrix is the embedding, (vocabulary, width)
        as it is stored."""
        name = self._experts[name][0] if name in self._experts else name
        stored = name if name in self._files else self._tied_embedding
        assert stored is not None  # `find` has seen to it
        return self._files[stored], stored

    @cached_property
    def _tied_embedding(self) -> str | None:
        """The input embedding that is the output matrix too; None where there is none, or it is not certain."""
        embeddings = [name for name in self._files if _INPUT.search(name)]
        return embeddings[0] if len(embeddings) == 1 and self._is_tied else None

    @property
    def _is_tied(self) -> bool:
        """By `config.json`; where that is silent, as transformers takes it for the type of model."""
        told = self._config.get("tie_word_embeddings")
        if told is not None or "model_type" not in self._config:
            return told is True
        from transformers import CONFIG_MAPPING

        kind = self._config["model_type"]
        return (
            isinstance(kind, str)
            and kind in CONFIG_MAPPING
            and getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", False) is True
        )

    @cached_property
    def _config(self) -> dict[str, Any]:
        file = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        return read_json(file) if file.is_file() else {}

    def _is_transposed(self, name: str) -> bool:
        if len(self.stored_shape(name)) != 2:
            return False
        if name in self._experts:
            return self.has_transposed_stacks
        module = name.removesuffix(".weight").rpartition(".")[2]
        return is_embedding(name) or (self.has_conv1d and module in CONV1D_NAMES)

    def _name(self, parameter: str) -> str:
        name = self.find(parameter)
        if name is None:
            raise InputError(f"{self.path}: {parameter}: no such weight; it has {some(self.names)}")
        return name

    def _candidates(self, parameter: str) -> list[str]:
        """By the first of the ways in which names differ that finds any."""
        ways = (self._longer, self._shorter, self._moved, self._alike, self._flat)
        return next((found for way in ways if (found := way(parameter))), [])

    def _longer(self, parameter: str) -> list[str]:
        return [name for name in self._by_end[_end(parameter)] if _is_wrapped(name, parameter)]

    def _shorter(self, parameter: str) -> list[str]:
        return [name for name in self._by_end[_end(parameter)] if _is_wrapped(parameter, name)]

    def _alike(self, parameter: str) -> list[str]:
        """Another wrapper in place of one: `bert.encoder.` and `model.encoder.`."""
        inner = parameter.partition(".")[2]
        return [name for name in self._by_end[_end(parameter)] if name.partition(".")[2] == inner and "." in inner]

    def _flat(self, parameter: str) -> list[str]:
        flat = flat_name(parameter)
        if flat is None:
            return []
        ends = [(name, name.removesuffix(".weight").split(".")) for name in self._files if name.endswith(".weight")]
        if whole := [name for name, parts in ends if "_".join(parts) == flat]:
            return whole
        return [name for name, parts in ends if _is_flat_end(parts, flat)]

    def _moved(self, parameter: str) -> list[str]:
        """Of a text model in another, by its old and new place: `language_model.model.`, `model.language_model.`."""
        inner = _INNER.sub("", parameter)
        return [name for name in self._by_end[_end(parameter)] if _INNER.sub("", name) == inner]

    @cached_property
    def _by_end(self) -> defaultdict[str, list[str]]:
        found: defaultdict[str, list[str]] = defaultdict(list)
        for name in (*self._files, *self._experts):
            found[_end(name)].append(name)
        return found


def flat_name(parameter: str) -> str | None:
    """The name of a module in kohya's form, without its prefix; None for another."""
    match = _FLAT.fullmatch(parameter)
    return match[1] if match else None


def llama_cpp_name(parameter: str) -> bool:
    """Whether a parameter has kept llama.cpp's name, so that its rows may stand in another order than the model's."""
    return bool(_LLAMA_CPP.match(parameter))


def is_embedding(name: str) -> bool:
    """Whether a weight is an embedding's, by its name."""
    return bool(_EMBEDDING.search(name))


def weight_files(path: Path) -> list[Path]:
    """The file itself; or a folder's shards, by its index, or its weight files. InputError where there are none."""
    if not path.is_dir():
        check_regular(path)
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / f"{name}.index.json").exists():
            return _shards(path / f"{name}.index.json")
        if (path / name).exists():
            return [path / name]
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        files = (file for file in path.iterdir() if file.suffix in suffixes and not _OF_TRAINING.match(file.name))
        if found := sorted(file for file in files if file.is_file()):
            return found
    raise InputError(f"{path}: holds no weights ({', '.join('*' + suffix for suffix in SUFFIXES)})")


def _shards(index: Path) -> list[Path]:
    """The files that an index names; InputError for one outside the folder, or that is missing."""
    table = read_json(index, limit_bytes=INDEX_BYTES).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise InputError(f"{index}: weight_map: must say the file of each weight")
    folder = Path(os.path.realpath(index.parent))
    hub = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder  # the Hub's cache links there
    files = []
    for name in sorted(set(table.values())):
        file = index.parent / name
        if not is_file_name(name) or Path(os.path.realpath(file)).parent not in (folder, hub):
            raise InputError(f"{index}: weight_map: {clip(name)}: leads outside the folder, or is no name of a file")
        check_regular(file)
        files.append(file)
    return files


def is_file_name(name: str) -> bool:
    """Whether a file may be called so, in its folder."""
    return Path(name).name == name and "\0" not in name and len(name.encode("utf-8", "surrogatepass")) <= _NAME_BYTES


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _is_wrapped(long: str, short: str) -> bool:
    """Whether a name is another with a wrapper before it."""
    prefix = long.removesuffix(f".{short}")
    return prefix != long and not any(part.isdigit() for part in prefix.split("."))


def _is_flat_end(parts: list[str], flat: str) -> bool:
    """Whether the last modules of a name are `flat`, and a wrapper before them."""
    starts = (i for i in range(1, len(parts)) if "_".join(parts[i:]) == flat)
    return any(not any(part.isdigit() for part in parts[:i]) for i in starts)


def some(names: list[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(map(clip, names[:3])) + (f", … ({len(names)} in all)" if len(names) > 3 else "")
