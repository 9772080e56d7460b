"""An adapter of one base, moved to another by their weights alone, and written in PEFT's format.

Shapes: M out features, N in features of the old base, M' and N' of the new one, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorabench.adapters.compression.compressible import Subject, matrices, modules_of, saved_whole
from lorabench.adapters.compression.compressor import stored_dtype
from lorabench.adapters.moving.cross_lora import cross_lora
from lorabench.adapters.moving.maps import Move, top_vectors
from lorabench.adapters.moving.partners import Partners
from lorabench.adapters.moving.project import project
from lorabench.config.decode import InputError
from lorabench.config.plugins import unknown
from lorabench.config.quote import clip, show_path
from lorabench.linalg.decompose import ThinSVD, one_thread, thin_svd
from lorabench.spec.move import BY_DATA
from lorabench.updates.layer import layer_kind
from lorabench.updates.locate import weights_path
from lorabench.updates.modules import Modules
from lorabench.updates.peftfile import Beside, Target, configuration, save_adapter, whole_folder
from lorabench.updates.readers._entry import Entry
from lorabench.updates.stacked import wrapper_of
from lorabench.updates.update import Update
from lorabench.updates.weightfile import WeightFiles

WAYS: dict[str, Callable[[ThinSVD, ThinSVD], Move]] = {"project": project, "cross-lora": cross_lora}
NO_PRODUCT = "so that ΔW is no product of two factors; lorabench compress makes it one"
TAKEN = "has a partner in the new base that is another's already"
DRAWS = 4
"""Random updates of a layer that are moved too, for what chance gives; the mean is told."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Moved:
    """One layer's ΔW' = B A, B (M', r) and A (r, N'), of the module `partner` of the new base; `row` tells of it."""

    partner: str
    B: Tensor
    A: Tensor
    row: dict[str, Any]

    @property
    def update(self) -> Update:
        return Update(parameter=f"{self.partner}.weight", B=self.B, A=self.A)


class Transfer:
    """A subject on its way from one base to another; `target` is what `to` means. InputError for what cannot be read.

    `source` is a base (a folder, a file, a Hub id, `builtin:NAME`); without it, the one that the run or the adapter's
    configuration names.
    """

    def __init__(self, subject: Subject, to: str, source: str | None, by: str, rank: int):
        ways = [*WAYS, BY_DATA]
        if by not in ways:
            raise InputError(f"--by {clip(by)}: {unknown('way', by, ways)}")
        self.to, self.by, self.rank = to, by, rank
        self.source_name, self.revision = _base_of(subject, source)
        self.source = _weight_files(self.source_name, self.revision, "--from")
        self.target = _weight_files(to, None, "--to")
        self.subject = replace(subject, weights=self.source)
        self.left_out: dict[str, str] = {}
        """Layer -> why it is not moved."""

    @property
    def modules(self) -> Modules:
        return modules_of(self.subject)

    @property
    def by_data(self) -> bool:
        return self.by == BY_DATA

    @cached_property
    def entries(self) -> dict[str, tuple[Entry, str]]:
        """Module of the old base -> its ΔW, and the module of the new one; what is not moved stands in `left_out`.

        InputError where nothing is left.
        """
        if self.subject.config.get("use_dora"):
            raise InputError(f"{self.subject.name}: is DoRA, {NO_PRODUCT}")
        if not self._pairs:
            some = next(iter(self.left_out.items()))
            raise InputError(f"--to {clip(self.to)}: takes no layer of {self.subject.name}: {some[0]} {some[1]}")
        return self._pairs

    @cached_property
    def fits(self) -> dict[str, str]:
        """Module of the old base -> module of the new one, where each has the shape of its partner: then ΔW can be put
        there as it is. Else empty."""
        pairs = {old: new for old, (_, new) in self._pairs.items()}
        shape = lambda weights, module: weights.stored_shape(f"{module}.weight")  # noqa: E731
        return pairs if all(shape(self.source, old) == shape(self.target, new) for old, new in pairs.items()) else {}

    @cached_property
    def _pairs(self) -> dict[str, tuple[Entry, str]]:
        modules, partners = self.modules, Partners(self.source, self.target)
        carried = saved_whole(modules)
        self.left_out |= dict.fromkeys(sorted(carried.beside.tensors), "was saved whole, and is not moved")
        self.left_out |= dict.fromkeys(self.subject.adapter.vectors.keys() - carried.names, "is a vector")
        found: dict[str, tuple[Entry, str]] = {}
        for parameter, entry in matrices(self.subject, modules, carried.names).items():
            if reason := _not_linear(parameter, entry, modules):
                self.left_out[parameter] = reason
                continue
            module = modules.module(parameter)
            named = parameter.removeprefix(f"{modules.model}.")  # the file may have a wrapper that the weights lack
            partner = partners.find(named if named.endswith(f".{module}.weight") else f"{module}.weight")
            taken = {each for _, each in found.values()}
            if partner is None or partner.removesuffix(".weight") in taken:
                self.left_out[parameter] = "has no partner in the new base" if partner is None else TAKEN
            else:
                found[module] = entry, partner.removesuffix(".weight")
        return found

    def layers(self) -> Iterator[Moved]:
        """One at a time. InputError for a ΔW that is dense."""
        dtype = stored_dtype({module: entry for module, (entry, _) in self.entries.items()})
        for module, (entry, partner) in self.entries.items():
            update = entry.load()
            if not isinstance(update, Update) or update.A is None:
                raise InputError(f"{self.subject.name}: {module}: is dense, {NO_PRODUCT}")
            weights = self.source.read(f"{module}.weight"), self.target.read(f"{partner}.weight")
            old, new = (top_vectors(weight, self.rank) for weight in weights)
            with one_thread():
                moved = _moved(module, partner, update, WAYS[self.by](old, new), dtype)
            yield moved

    def write(self, folder: Path, moved: Sequence[Moved]) -> None:
        """The adapter in PEFT's format, its scale 1, into a folder that is new or empty."""
        targets = [Target(module=each.partner, B=each.B, A=each.A, rank=len(each.A)) for each in moved]
        config = {key: self.subject.config[key] for key in ("task_type",) if key in self.subject.config}
        about = {"base_model_name_or_path": self.to, "fan_in_fan_out": self.target.has_conv1d}
        beside = Beside(config=config | about)
        with whole_folder(folder) as temporary:
            save_adapter(temporary, targets, beside, configuration(targets, beside))


def check_empty(folder: Path) -> None:
    """InputError where something is there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output {show_path(folder)}: is not empty; nothing is overwritten")


def _base_of(subject: Subject, source: str | None) -> tuple[str, str | None]:
    """Name and revision of the base that the adapter is of. InputError where none is known."""
    if source is not None:
        return source, None
    if subject.own and subject.spec:
        return subject.spec.model, subject.spec.revision
    named = subject.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise InputError(f"--from: {subject.name} does not name its base, which has to be given")
    return named, subject.config.get("revision")


def _weight_files(name: str, revision: str | None, flag: str) -> WeightFiles:
    """A base's weights. InputError, which begins with `flag`, where there are none."""
    try:
        return WeightFiles(weights_path(name, revision))
    except InputError as error:
        raise InputError([f"{flag} {problem}" for problem in error.problems]) from error


def _not_linear(parameter: str, entry: Entry, modules: Modules) -> str | None:
    """Why a matrix is not moved though it has a ΔW."""
    if wrapper_of(modules.adapter.config, entry) or parameter.removesuffix(".weight").endswith("]"):
        return "is of stacked experts, or a part of a weight"
    module = modules.module(parameter)
    if modules.embeds(parameter, module) or modules.kernel(parameter):
        return "is no linear layer"
    return None


def _moved(module: str, partner: str, update: Update, move: Move, dtype: torch.dtype) -> Moved:
    assert update.A is not None  # `layers` has seen to it
    B, A = (factor.to(dtype) for factor in move(update.B, update.A))
    svd, new = thin_svd(update.B, update.A), thin_svd(B, A)
    norm = float(svd.S.norm())
    overlaps = _overlaps(svd, new)
    null = _chance_of_overlaps(svd, move) if overlaps else {}
    row = {
        "layer": module,
        "partner": partner,
        "kind": layer_kind(module),
        "rank": update.B.shape[1],
        "num_vectors": [move.out.of.shape[1], move.into.of.shape[1]],
        "shape": [*update.shape],
        "new_shape": [len(B), A.shape[1]],
        "norm": norm,
        "kept": float(new.S.norm()) / norm if norm else None,
        "kept_null": move.chance,
        **{f"overlap_{side}": overlaps.get(side) for side in ("out", "in")},
        **{f"overlap_{side}_null": null.get(side) for side in ("out", "in")},
        "signs_known": move.signs_known,
    }
    return Moved(partner=partner, B=B.contiguous(), A=A.contiguous(), row=row)


def _overlaps(old: ThinSVD, new: ThinSVD) -> dict[str, float]:
    """φ(r, r) of ΔW's directions before and after, on the sides whose width is the same: ‖QᵀQ'‖_F² / r."""
    r, s = old.numerical_rank, new.numerical_rank
    if not r or not s:
        return {}
    sides = {"out": (old.U[:, :r], new.U[:, :s]), "in": (old.Vh[:r].mT, new.Vh[:s].mT)}
    same = {side: pair for side, pair in sides.items() if len(pair[0]) == len(pair[1])}
    return {side: float((Q.mT.double() @ P.double()).square().sum()) / min(r, s) for side, (Q, P) in same.items()}


def _chance_of_overlaps(svd: ThinSVD, move: Move) -> dict[str, float]:
    """The same of updates with ΔW's singular values in random directions, moved likewise."""
    generator = torch.Generator().manual_seed(0)
    r, found = max(1, svd.numerical_rank), []
    for _ in range(DRAWS):
        U, V = (torch.linalg.qr(torch.randn(d, r, generator=generator)).Q for d in (len(svd.U), svd.Vh.shape[1]))
        random = ThinSVD(U=U, S=svd.S[:r], Vh=V.mT)
        found.append(_overlaps(random, thin_svd(*move(U * random.S.float(), V.mT))))
    return {side: sum(each.get(side, 0.0) for each in found) / DRAWS for side in found[0]}
