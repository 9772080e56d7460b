"""kohya-ss and LyCORIS: one file of `lora_unet_…`, `lora_te_…` modules, names with `_` for `.`.

ΔW = s B A with s = α / r, α of `alpha` in the file; where there is none, or 0, of `--alpha`; else s = 1, kohya's own
rule. LoRA: `lora_up` (out, r) and `lora_down` (r, in), convolutions flattened; LoCon with a core `lora_mid`; LoHa
`hada_*`; LoKr `lokr_*`; whole changes `diff`, `diff_b`, `w_norm`, `b_norm`. Where there is a `dora_scale`, ΔW needs W0;
without, what is read is s B A. A parameter's name is that of its module in the file with `.weight`; points are not put
back, for `_` is part of names too.

Source: kohya-ss/sd-scripts, `networks/lora.py`; LyCORIS, `lycoris/modules`. Fused linears are split (`_fused`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from lorabench.config.quote import counted
from lorabench.updates.readers import _lycoris
from lorabench.updates.readers._dora import Dora
from lorabench.updates.readers._entry import Found, Source, Tensors
from lorabench.updates.readers._factors import (
    Form,
    Layer,
    Scale,
    adapter_file,
    as_dora,
    by_convention,
    found,
    number,
    plain,
    rank_of,
)
from lorabench.updates.readers._fused import split_rows
from lorabench.updates.readers._names import DIFFUSION_MODEL, Named

LORA = {"lora_up.weight": "B", "lora_down.weight": "A"}
LOCON = {f"lora_{part}.weight": f"lora_{part}" for part in ("up", "down", "mid")}
LOHA = tuple(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
LOHA_CORES = ("hada_t1", "hada_t2")
LOKR = tuple(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
WHOLE = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}
LYCORIS = {*LOHA, *LOHA_CORES, *LOKR, *WHOLE}
PRODUCTS = {*LOCON, *LYCORIS} - WHOLE.keys()
KERNELS = ("lora_mid.weight", "lora_down.weight", *_lycoris.KERNELS)
"""Roles whose tensor ends in a convolution's (height, width)."""
RANKED = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
"""Roles whose tensor has r rows."""
ASSUMED = "no alpha in the file, or 0: the scale is assumed to be 1"

_ROLE = "|".join(map(re.escape, sorted({*PRODUCTS, *WHOLE, "alpha", "dora_scale"})))
_NAME = re.compile(rf"(?P<module>.+?)\.(?P<role>{_ROLE})")
_PREFIXES = ("lora_", "lycoris_")

Module = dict[str, str]
"""Role -> tensor."""


def find(source: Source) -> Found | None:
    """The adapter of one file with such names; None where there is none."""
    tensors = adapter_file(source, lambda tensors: bool(_modules(tensors)))
    if tensors is None:
        return None
    modules = _modules(tensors)
    layers = [layer for name, module in modules.items() for layer in _layers(tensors, name, module, source)]
    used = {tensor for module in modules.values() for tensor in module.values()}
    lycoris = any(module.keys() & LYCORIS for module in modules.values())
    format = "lycoris" if lycoris else "kohya"
    unused = sum("alpha" in module and _is_whole_lokr(module) for module in modules.values())
    notes = [f"alpha of {counted(unused, 'layer')} is not used: LoKr of two whole matrices has s = 1"] if unused else []
    return found(format, layers, assumed=ASSUMED, notes=notes, left_out=set(tensors.names) - used)


def _modules(tensors: Named) -> dict[str, Module]:
    """The modules that hold a ΔW."""
    modules: dict[str, Module] = {}
    for tensor in tensors.names:
        match = _NAME.fullmatch(tensor)
        if match and not tensor.startswith("base_model.model."):  # PEFT's LoHa and LoKr: α is in its configuration
            modules.setdefault(match["module"], {})[match["role"]] = tensor
    return {
        name: module
        for name, module in modules.items()
        if module.keys() & PRODUCTS
        or (module.keys() & WHOLE.keys() and (name.startswith(_PREFIXES) or DIFFUSION_MODEL in tensors.wrappers))
    }


def _layers(tensors: Tensors, name: str, module: Module, source: Source) -> Iterator[Layer | Dora]:
    """The ΔW of one module: of its weight, whole or by parts, and of its bias."""
    for role, kind in WHOLE.items():
        if role in module:
            yield Layer(tensors=tensors, parameter=f"{name}.{kind}", names={"delta": module[role]}, form=_whole)
    if not module.keys() & PRODUCTS:
        return
    roles, form = _product(module)
    layer = Layer(
        tensors=tensors,
        parameter=f"{name}.weight",
        names={argument: module.get(role, f"{name}.{role}") for role, argument in roles.items()},
        form=form,
        scale=_scale(tensors, module, source),
        kernel=next((tensors.shape(module[role])[2:] for role in KERNELS if role in module), ()),
    )
    for part in split_rows(layer, name, source.weights):
        if "dora_scale" in module:
            m = tensors.shape(module["dora_scale"])  # (out, 1, …), or (1, in, …) with wd_on_out = False
            by_input = len(m) > 1 and m[0] == 1 < part.shape[0]
            yield from as_dora(part, source, module["dora_scale"], by_input=by_input)
        else:
            yield part


def _whole(delta: Tensor) -> tuple[Tensor, None]:
    return delta.reshape(delta.shape[0], -1), None


def _product(module: Module) -> tuple[dict[str, str], Form]:
    """Role -> argument of the form, and the form."""
    if "lora_mid.weight" in module:
        return LOCON, _lycoris.locon
    if module.keys() & LORA.keys():
        return LORA, plain
    if module.keys() & {*LOHA, *LOHA_CORES}:
        return {role: role for role in (*LOHA, *LOHA_CORES) if role in LOHA or role in module}, _lycoris.loha
    return {role: role for role in LOKR if role in module}, _lycoris.lokr


def _is_whole_lokr(module: Module) -> bool:
    """LyCORIS sets s = 1 then, and saves α all the same."""
    return {"lokr_w1", "lokr_w2"} <= module.keys() and not module.keys() & set(RANKED)


def _scale(tensors: Tensors, module: Module, source: Source) -> Scale:
    factor = next((module[role] for role in RANKED if role in module), None)
    if factor is None:  # LoKr of two whole matrices: LyCORIS sets s = 1
        return Scale(value=1.0, source="file")
    rank = rank_of(tensors, factor)
    alpha = number(tensors, module["alpha"]) if "alpha" in module else 0.0
    return Scale(value=alpha / rank, source="file") if alpha else by_convention(source, rank)
