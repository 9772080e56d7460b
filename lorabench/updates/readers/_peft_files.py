"""Which files are a PEFT adapter's: its tensors, whole or in shards, and the configuration that speaks of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.updates.readers._entry import CONFIG_FILE, Source, read_json
from lorabench.updates.readers._names import PREFIX, Named, open_named
from lorabench.updates.readers._peft_config import ADAPTER_FILE, ADAPTER_FILES
from lorabench.updates.tensorfile import SUFFIXES, Shards, open_tensors
from lorabench.updates.weightfile import INDEX_BYTES, some

_SHARD = re.compile(r"adapter_model-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})\.(?:safetensors|bin)")
"""transformers saves an adapter so that is larger than max_shard_size."""
PATTERNS = ("rank_pattern", "alpha_pattern")
_INDICES = ("adapter_model.safetensors.index.json", "model.safetensors.index.json", "adapter_model.bin.index.json")


def own_configuration(source: Source) -> dict[str, Any]:
    """The configuration of what is given; empty where there is none, or it is another file's."""
    file = source.folder / CONFIG_FILE
    if not file.exists() or (source.path.is_file() and not _has_own_name(source.path) and _own_files(source.folder)):
        return {}
    return read_json(file)


def as_trained(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration with its patterns in the order of the spec of the run whose adapter it is.

    PEFT takes the first pattern that fits a module, and sorts them when it writes: of patterns that overlap, which
    runs of today do not write, another may be the first in the file than was in training.
    """
    spec = folder.parent / "spec.json"
    if folder.name != "updates" or not spec.is_file():
        return config
    method = _table(read_json(spec).get("method"))
    told = method.get("config") if method.get("name") == "peft" else method
    ranks, alphas = (_table(_table(told).get(key)) for key in PATTERNS)
    orders = {"rank_pattern": [*ranks], "alpha_pattern": [*alphas] if told is not method else [*(ranks | alphas)]}
    return config | {
        key: {name: config[key][name] for name in orders[key] if name in config[key]}
        for key in PATTERNS
        if _table(config.get(key)) and config[key].keys() <= {*orders[key]}
    }


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def adapter_tensors(source: Source) -> Named | None:
    """The tensors of what is given; None for a file that is named by itself and has none of PEFT's names. InputError
    where a folder has none, or a shard is missing."""
    if source.path.is_file() and not _SHARD.fullmatch(source.path.name):
        tensors = open_named(source.path)
        is_peft = _has_own_name(source.path) or any(name.startswith(PREFIX) for name in tensors.names)
        return tensors if is_peft else None
    return folder_tensors(source.folder)


def folder_tensors(folder: Path) -> Named:
    """The adapter of a folder. InputError where there is none, with what lies there."""
    for name in ADAPTER_FILES:
        if (folder / name).exists():
            return open_named(folder / name)
    if shards := [file for file in _own_files(folder) if _SHARD.fullmatch(file.name)]:
        return Named(_joined(folder, shards))
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (*SUFFIXES, ".gguf"))
    beside = f"; beside {CONFIG_FILE} lie {some(others)} (give one by its name)" if others else ""
    raise InputError(f"{folder / ADAPTER_FILE}: no such file{beside}")


def has_adapter_file(folder: Path) -> bool:
    return bool(_own_files(folder))


def _own_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _has_own_name(file))


def _has_own_name(file: Path) -> bool:
    return file.name in ADAPTER_FILES or bool(_SHARD.fullmatch(file.name))


def _joined(folder: Path, files: list[Path]) -> Shards:
    matches = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    count = max(int(match["count"]) for match in matches)
    missing = sorted({*range(1, count + 1)} - {int(match["number"]) for match in matches})
    if missing or len(files) != count:
        raise InputError(
            f"{folder}: has {len(files)} shards of an adapter of {count}; missing are {some([*map(str, missing)])}"
        )
    shards = Shards(folder / files[0].name, [open_tensors(file) for file in files])
    for index in (folder / name for name in _INDICES):
        table = read_json(index, limit_bytes=INDEX_BYTES).get("weight_map") if index.exists() else None
        if isinstance(table, dict) and (absent := sorted(table.keys() - {*shards.names})):
            raise InputError(f"{index}: names tensors that no shard holds: {some(absent)}")
    return shards
