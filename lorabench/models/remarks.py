"""What a run's record and the plan have to say of a base: what is random in it, out of reach or not quantized, and
where a rank is above what its layers can have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorabench.models import base_model as models
from lorabench.models import targets, weights

if TYPE_CHECKING:
    from torch import nn

    from lorabench.spec.run_spec import RunSpec

SHOWN = 6


def remarks(spec: RunSpec, base: nn.Module) -> dict[str, str]:
    """Remarks on the untouched base by what they are about: `base`, `targets`, `patterns`, `ranks`, `quantization`."""
    found = {
        "base": _of_files(base),
        "targets": _of_targets(spec, base),
        "patterns": _of_patterns(spec, base),
        "ranks": _of_ranks(spec, base),
        "quantization": _of_quantization(spec, base),
    }
    return {key: text for key, text in found.items() if text}


def _of_files(base: nn.Module) -> str:
    drawn = models.drawn_modules(base)
    return f"random, for the model's files lack it: {_some(drawn)}; it is saved with what is learned" if drawn else ""


def _of_targets(spec: RunSpec, base: nn.Module) -> str:
    left = spec.method.left_out(base)
    return f"all-linear does not reach {_some(left)} with method {spec.method.name}" if left else ""


def _of_patterns(spec: RunSpec, base: nn.Module) -> str:
    vain = spec.method.without_effect(base)
    return f"{_some(vain)}: without effect, for of each layer's patterns the first counts, as in PEFT" if vain else ""


def _of_ranks(spec: RunSpec, base: nn.Module) -> str:
    """Of factors (M, r) and (r, N) with r above M or N."""
    above: dict[tuple[str, int], list[str]] = {}
    for name, (key, rank) in spec.method.ranks(base).items():
        if rank > min(weights.sides(base, name)):
            above.setdefault((key, rank), []).append(name)
    return "; ".join(
        f"{key} = {rank}: is above the smaller side of {_with_sides(names, base)}: "
        "what is more than that adds parameters, and no rank to ΔW"
        for (key, rank), names in above.items()
    )


def _with_sides(names: list[str], base: nn.Module) -> str:
    first, *others = names
    sides = " x ".join(map(str, weights.sides(base, first)))
    more = f" and of {len(others)} other layer{'s' if others[1:] else ''}" if others else ""
    return f"{first} ({sides}){more}"


def _of_quantization(spec: RunSpec, base: nn.Module) -> str:
    """bitsandbytes quantizes linear layers alone."""
    if spec.quantization == "none":
        return ""
    layers = targets.quantized_layers(base)
    exact = [name for name in targets.linear_layers(base) if name not in layers]
    exact += [name for name in targets.stacked_matrices(base) if not name.endswith(".weight")]
    share = sum(_count(module.weight) for module in layers.values()) / sum(map(_count, base.parameters()))
    left = f"; not {_some(targets.in_block(base, exact))}, which bitsandbytes leaves as it is" if exact else ""
    return f"{share:.1%} of the parameters are {spec.quantization}{left}"


def _count(parameter: Any) -> int:
    """A 4-bit weight packs two into a byte."""
    return int(parameter.numel()) * (2 if type(parameter).__name__ == "Params4bit" else 1)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
