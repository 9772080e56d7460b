"""Random damage: to bytes, to text, to JSON values, and to safetensors files."""

from __future__ import annotations

import json
import random
import string
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

DTYPES = ("float32", "float16", "float64", "int8", "int64", "bool")
DEEP = "[" * 3000 + "]" * 3000
NAMES = (
    "__metadata__",
    "a" * 300,
    "x\x00y",
    "",
    "..",
    "/etc/passwd",
    "base_model.model.",
    "lora_A",
    "\x1b[31m",
    "ü$%_<",
)


def value(random_: random.Random, depth: int = 0) -> Any:
    """Any JSON value, most of them of the wrong kind wherever they stand."""
    plain = [
        None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -1.5, 1e308, float("nan"), float("inf"),
        "", "x", "none", "1e-4", "../..", "\x00", "\x1b[2J", "$\\frac", "<b>", "a\n\nb", "é" * 40, "y" * 5000, [], {},
    ]  # fmt: skip
    kind = random_.random()
    if depth < 3 and kind < 0.08:
        return [value(random_, depth + 1) for _ in range(random_.randint(1, 4))]
    if depth < 3 and kind < 0.16:
        return {
            random_.choice((*NAMES, "r", "status")): value(random_, depth + 1) for _ in range(random_.randint(1, 3))
        }
    if kind < 0.19:
        return nested(random_.choice((10, 200)))
    return random_.choice(plain)


def nested(depth: int) -> Any:
    found: Any = 0
    for _ in range(depth):
        found = [found]
    return found


def changed(table: Any, random_: random.Random) -> Any:
    """The value with one place in it replaced, taken away or added to."""
    if isinstance(table, dict) and table and random_.random() < 0.85:
        key = random_.choice([*table])
        act = random_.random()
        if act < 0.1:
            return {k: v for k, v in table.items() if k != key}
        if act < 0.15:
            return table | {random_.choice(NAMES): value(random_)}
        if act < 0.2:
            return {(random_.choice(NAMES) if k == key else k): v for k, v in table.items()}
        return table | {key: changed(table[key], random_)}
    if isinstance(table, list) and table and random_.random() < 0.7:
        place = random_.randrange(len(table))
        return [*table[:place], changed(table[place], random_), *table[place + random_.randint(0, 1) :]]
    if isinstance(table, (int, float)) and not isinstance(table, bool) and random_.random() < 0.5:
        return random_.choice((-table, table * 10, table + 1, str(table), 0.5 if table > 2**63 else float(table), 0))
    return value(random_)


def changed_json(content: bytes, random_: random.Random) -> bytes:
    """A JSON file with a value changed, or its text damaged."""
    if random_.random() < 0.3:
        return changed_bytes(content, random_)
    try:
        table = json.loads(content)
        text = json.dumps(changed(table, random_))
    except (ValueError, RecursionError):
        return changed_bytes(content, random_)
    if random_.random() < 0.02:
        text = text.replace("0", "9" * 6000, 1)
    if random_.random() < 0.02:
        text = text.replace(": ", ": " + DEEP, 1)
    return text.encode("utf-8", "surrogatepass")


def changed_bytes(content: bytes, random_: random.Random) -> bytes:
    """Bytes flipped, cut, repeated, put in or emptied."""
    act, place = random_.random(), random_.randrange(len(content) + 1)
    end = min(len(content), place + random_.randint(1, 40))
    if act < 0.4:
        return content[:place] + random_.randbytes(random_.randint(1, 4)) + content[end:]
    if act < 0.6:
        return content[:place]
    if act < 0.75:
        return content[:place] + content[place:end] * random_.randint(2, 50) + content[end:]
    if act < 0.9:
        return content[:place] + content[end:]
    return random_.choice((b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 20_000, random_.randbytes(200)))


def changed_text(text: str, random_: random.Random) -> str:
    """A line or a token of a TOML file replaced, taken away, repeated or moved."""
    lines = text.splitlines() or [""]
    place = random_.randrange(len(lines))
    act = random_.random()
    if act < 0.15:
        return "\n".join(lines[:place] + lines[place + 1 :])
    if act < 0.25:
        return "\n".join([*lines[:place], lines[place], *lines[place:]])
    if act < 0.35:
        other = random_.randrange(len(lines))
        lines[place], lines[other] = lines[other], lines[place]
        return "\n".join(lines)
    key, equals, _ = lines[place].partition("=")
    if equals and act < 0.85:
        lines[place] = f"{key}= {_toml(value(random_))}"
    elif act < 0.95:
        letters = random_.choices(string.printable, k=random_.randint(1, 6))
        cut = random_.randrange(len(lines[place]) + 1)
        lines[place] = lines[place][:cut] + "".join(letters) + lines[place][cut + random_.randint(0, 3) :]
    else:
        return "\n".join(lines)[: random_.randrange(len(text) + 1)]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """JSON's writing is TOML's for most values; the others are syntax errors, which are wanted too."""
    if value == []:
        return DEEP
    return json.dumps(value)[:20_000].replace("NaN", "nan").replace("Infinity", "inf")


def change_tensors(file: Path, random_: random.Random) -> None:
    """A safetensors file with a tensor renamed, reshaped, of another dtype, emptied, doubled or taken away."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, KeyError, TypeError):
        tensors = {}
    if not tensors or random_.random() < 0.2:
        return _change_header(file, random_)
    for _ in range(random_.randint(1, 2)):
        name = random_.choice([*tensors])
        tensor, act = tensors[name], random_.random()
        if act < 0.2:
            tensors[_renamed(name, random_)] = tensors.pop(name)
        elif act < 0.3 and len(tensors) > 1:
            del tensors[name]
        elif act < 0.5:
            shape = tuple(random_.choice((0, 1, 2, 3, 7)) for _ in range(random_.randint(0, 4)))
            tensors[name] = np.ones(shape, tensor.dtype)
        elif act < 0.65:
            tensors[name] = np.asarray(np.nan_to_num(tensor.astype(np.float32))).astype(random_.choice(DTYPES))
        elif act < 0.75:
            tensors[name] = np.full_like(tensor, random_.choice((0, 1e30, float("nan"), float("inf"))), np.float32)
        elif act < 0.85:
            tensors[name] = np.ascontiguousarray(tensor.T).reshape(tensor.T.shape)
        else:
            tensors[_renamed(name, random_)] = tensor
    tensors = {name: np.array(tensor, ndmin=0, copy=True) for name, tensor in tensors.items()}
    metadata = random_.choice((None, None, {"format": "pt"}, {random_.choice(NAMES) or "x": "[" * 2000}))
    save_file(tensors, file, metadata=metadata)
    return None


def _renamed(name: str, random_: random.Random) -> str:
    parts = name.split(".")
    place = random_.randrange(len(parts))
    new = random_.choice(
        (*NAMES[1:], "_orig_mod", "module", "default", "0", "99999999999", "alpha", "weight", "lora_B")
    )
    return ".".join([*parts[:place], new, *parts[place + random_.randint(0, 1) :]])


def _change_header(file: Path, random_: random.Random) -> None:
    content = file.read_bytes()
    if len(content) < 9:
        return
    size = min(struct.unpack("<Q", content[:8])[0], len(content) - 8)
    header = changed_json(content[8 : 8 + size], random_)
    claimed = len(header) if random_.random() < 0.8 else random_.choice((0, 1, 2**32, 2**63, len(header) + 8))
    file.write_bytes(struct.pack("<Q", claimed) + header + content[8 + size :])
