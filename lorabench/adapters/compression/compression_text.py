"""What `lorabench compress` prints: a row a body, and what must be said beside it; copies of the adapters."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.quote import show_path
from lorabench.report.aggregate import number, plain
from lorabench.report.page import Part
from lorabench.store.store import Store
from lorabench.terminal.text import TextTable
from lorabench.updates.weightfile import some

COLUMNS = ["body", "kept_%", "error", "rank", "parameters", "kib"]
METRICS = {
    "valid_loss": 1, "valid_accuracy": 100, "valid_token_accuracy": 100, "retain_loss": 1, "retain_token_accuracy": 100,
}  # fmt: skip
"""Those that are shown, and what by; shares as percentages."""


def compression_text(store: Store, records: Sequence[dict[str, Any]]) -> str:
    """The table, what must be said beside it, and where the adapters are."""
    paths = [f"{r['body']}: {adapter_folder(store, r)}" for r in records if "kept" in r]
    return "\n".join([compression_table(records).text, "", *_remarks(records), *paths])


def compression_part(name: str, records: Sequence[dict[str, Any]]) -> Part:
    """A page's section of what was made of one adapter."""
    text = (
        "Each layer cut to the smallest rank whose singular values hold a share of Σσ² of ΔW; evaluated on the "
        "validation split. Error: ‖ΔW − ΔW_r‖ / ‖ΔW‖. Rank: least, median and largest over the layers."
    )
    return Part(
        title=f"Compressions of {name}", text=text, tables=[compression_table(records)], notes=_remarks(records)
    )  # fmt: skip


def compression_table(records: Sequence[dict[str, Any]]) -> TextTable:
    """Kept share of Σσ², ‖ΔW − ΔW_r‖ / ‖ΔW‖, ranks, sizes, and the metrics there are."""
    shown = [name for name in METRICS if any(name in record["metrics"] for record in records)]
    heads = {name: f"{name}_%" if METRICS[name] == 100 else name for name in shown}
    rows = [_sizes(record) | {heads[name]: _metric(record["metrics"], name) for name in shown} for record in records]
    return TextTable(title="", heads=[*COLUMNS, *heads.values()], rows=rows)


def _sizes(record: dict[str, Any]) -> dict[str, Any]:
    """`rank` is `min/median/max` over the layers."""
    ranks, size = record.get("ranks"), record.get("bytes")
    return {
        "body": record["body"],
        "kept_%": number(100 * record["kept"], 2) if "kept" in record else None,
        "error": plain(record["relative_error"]) if "kept" in record else None,
        "rank": "/".join(f"{ranks[key]:g}" for key in ("min", "median", "max")) if ranks else None,
        "parameters": number(record["num_parameters"], 0) if "num_parameters" in record else None,
        "kib": number(size / 2**10, 1) if size is not None else None,
    }


def _metric(metrics: dict[str, float], name: str) -> str | None:
    return plain(METRICS[name] * metrics[name]) if name in metrics else None


def _remarks(records: Sequence[dict[str, Any]]) -> list[str]:
    made: dict[str, Any] = next((record for record in records if "left_out" in record), {"left_out": {}, "tied": {}})
    left_out = made["left_out"]
    lines = []
    if left_out.get("num_vectors"):
        share = f"{number(100 * left_out['energy_of_vectors'], 2)}% of ΔW's energy"
        lines.append(f"left out: {left_out['num_vectors']} vectors (biases, norms), {share}: no factors hold them")
    if left_out.get("num_unchanged"):
        lines.append(f"left out: {left_out['num_unchanged']} layers whose ΔW is 0")
    if names := left_out.get("tensors"):
        lines.append(f"left out: {some(names)}: not understood")
    lines += left_out.get("models", [])
    lines += [
        f"{layer} and {twin} share one weight and have factors each: untie them before merging, or ΔW counts twice"
        for layer, twin in made["tied"].items()
    ]
    return lines


def adapter_folder(store: Store, record: dict[str, Any]) -> Path:
    return store.root / "compressions" / record["compression_id"] / "adapter"


def copy_adapters(store: Store, records: Sequence[dict[str, Any]], output: Path) -> None:
    """The adapter to `output`, or several to `output/energy-0.95`. InputError where a folder is not empty."""
    made = [record for record in records if "kept" in record]
    targets = [output / record["body"].replace(" ", "-") if len(made) > 1 else output for record in made]
    full = [target for target in targets if target.exists() and (not target.is_dir() or any(target.iterdir()))]
    if full:
        raise InputError([f"--output {show_path(target)}: is there already, and not empty" for target in full])
    for record, target in zip(made, targets, strict=True):
        try:
            shutil.copytree(adapter_folder(store, record), target, dirs_exist_ok=True)
        except OSError:
            shutil.rmtree(target, ignore_errors=True)  # half a copy; the folder was new or empty
            raise
