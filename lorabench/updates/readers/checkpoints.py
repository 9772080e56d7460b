"""Two checkpoints of one model, before and after: the dense ΔW of every weight that both have.

A weight is read when its ΔW is: memory holds one of each. Names may have another prefix in one of them
(`weightfile`). What was stored in fewer bits has a noise floor, so ΔW says the coarser of the two dtypes.
"""

from __future__ import annotations

import re

from lorabench.config.decode import InputError
from lorabench.updates.readers._difference import Difference
from lorabench.updates.readers._entry import Entry, Found, Source
from lorabench.updates.weightfile import WeightFiles, some

_OF_ADAPTERS = re.compile(r"lora|dora|hada_|lokr_|oft_|ia3_|vera_|adapter|prompt_emb|prefix_enc", re.IGNORECASE)


def find(source: Source) -> Found | None:
    """ΔW of a full checkpoint; None where the file holds something else. InputError where the base is not given."""
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
    if not source.files(*suffixes):
        return None
    tuned = WeightFiles(source.path)
    if any(_OF_ADAPTERS.search(name) for name in tuned.names) or not any(n.endswith(".weight") for n in tuned.names):
        return None
    base = source.weights
    if base is None:
        raise InputError(
            f"{source.path}: is a full checkpoint ({len(tuned.names)} tensors: {some(tuned.names)}): "
            "its ΔW needs the untouched one, with --base"
        )
    tuned.has_conv1d = base.has_conv1d = tuned.has_conv1d or base.has_conv1d  # one of them may lack its config.json
    tuned.has_transposed_stacks = base.has_transposed_stacks = tuned.has_transposed_stacks or base.has_transposed_stacks
    numbers = [name for name in tuned.names if "float" in tuned.dtype(name)]
    pairs = {name: parameter for name in numbers if (parameter := base.find(name))}
    if not pairs:
        raise InputError(
            f"{source.path}: shares no weight with the base {base.path}: {some(tuned.names)} and {some(base.names)}"
        )
    pairs, reshaped = _of_one_shape(pairs, tuned, base)
    entries: dict[str, Entry] = {pairs[name]: Difference(tuned, base, name, pairs[name]) for name in pairs}
    notes = [f"ΔW is the difference of two checkpoints, stored in {_dtypes(tuned)} and {_dtypes(base)}"]
    left = {
        "only the tuned one has": [name for name in numbers if base.find(name) is None],
        "not floating-point numbers (quantized?):": [name for name in tuned.names if name not in numbers],
        "only the base has": sorted(set(base.names) - set(pairs.values()) - set(reshaped)),
        "other shapes in": reshaped,
    }
    notes += [f"{what} {some(names)}" for what, names in left.items() if names]
    return Found(format="checkpoints", entries=entries, notes=tuple(notes))


def _of_one_shape(pairs: dict[str, str], tuned: WeightFiles, base: WeightFiles) -> tuple[dict[str, str], list[str]]:
    """The pairs that can be subtracted, and the base's names of the others (a resized vocabulary, another head)."""
    same = {name: parameter for name, parameter in pairs.items() if tuned.shape(name) == base.shape(parameter)}
    return same, sorted(parameter for name, parameter in pairs.items() if name not in same)


def _dtypes(files: WeightFiles) -> str:
    return " and ".join(sorted({files.dtype(name) for name in files.names}))
