"""One name for one tensor: what wrappers, adapters' names and old versions of models put into names is taken out.

All readers see files through `named`, so that neither they nor patterns nor what is written know of any of this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.updates.tensorfile import Tensors, open_tensors

PREFIX = "base_model.model."
"""Of the names in PEFT's files."""
DIFFUSION_MODEL = "diffusion_model."
"""ComfyUI's prefix of the denoiser."""
_ANYWHERE = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)
"""torch.compile, FSDP (also fairscale's), activation checkpointing, Lightning Fabric."""
_AT_THE_ROOT = "module."
"""DistributedDataParallel, DeepSpeed: before every name, for another module may be called so."""
_DENOISER = re.compile(rf"^({re.escape(PREFIX)})?(?:model\.)?{re.escape(DIFFUSION_MODEL)}")
_PART = (
    r"lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector)|hada_\w+|lokr_\w+|vera_lambda_[bd]|ia3_l|oft_R|"
    r"trainable_tokens_(?:delta|original)"
)
_TAIL = r"(?P<tail>(?:\.weight|\.bias)?)"
_ADAPTER = re.compile(rf"(?P<head>.+\.(?:{_PART}))\.(?P<adapter>(?!(?:weight|bias)$)[^.]+){_TAIL}")
_WITHOUT_NAME = re.compile(rf".+\.(?:{_PART}){_TAIL}")
_SAVED = re.compile(r"(?P<head>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<tail>.+)$")
_MOVED = (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."))
"""Vision-language models in transformers before 4.52, and since: `conversion_mapping.py`."""
_MOVED_WITH_IT = ("vision_tower.", "multi_modal_projector.", "vision_model.", "visual.")


class Named:
    """A file of tensors under such names. `wrappers` are those that were taken off the front of a name."""

    def __init__(self, tensors: Tensors):
        self.file: Path = tensors.file
        self._tensors = tensors
        unwrapped = {name: _unwrapped(name) for name in tensors.names}
        self.wrappers = {name for name in (DIFFUSION_MODEL,) if any(_DENOISER.match(each) for each in tensors.names)}
        if all(_root(name).startswith(_AT_THE_ROOT) for name in unwrapped.values()):
            unwrapped = {
                name: _with_root(short, _root(short)[len(_AT_THE_ROOT) :]) for name, short in unwrapped.items()
            }
        plain = _of_one_adapter(unwrapped, self.file)
        moved = _today(plain)
        self._stored: dict[str, str] = {}
        for name, today in moved.items():
            if today in self._stored:
                raise InputError(f"{self.file}: {name} and {self._stored[today]} are both {today}")
            self._stored[today] = name

    @property
    def names(self) -> list[str]:
        return sorted(self._stored)

    @property
    def metadata(self) -> dict[str, str]:
        return self._tensors.metadata

    def stored(self, name: str) -> str:
        """As the file calls it."""
        return self._stored.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self.stored(name))

    def dtype(self, name: str) -> str:
        return self._tensors.dtype(self.stored(name))

    def read(self, name: str) -> Tensor:
        return self._tensors.read(self.stored(name))


def open_named(file: Path) -> Named:
    """As `lorabench.updates.tensorfile.open_tensors`."""
    return Named(open_tensors(file))


def older(module: str) -> str | None:
    """The name before transformers 4.52 of a module that was moved then; None of any other."""
    return next((module.replace(new, old, 1) for old, new in _MOVED[:1] if module.startswith(new)), None)


def _root(name: str) -> str:
    return name.removeprefix(PREFIX)


def _with_root(name: str, root: str) -> str:
    return PREFIX + root if name.startswith(PREFIX) else root


def _unwrapped(name: str) -> str:
    name = _DENOISER.sub(r"\1", _ANYWHERE.sub("", name))
    return name.removeprefix(_AT_THE_ROOT) if name.startswith(_AT_THE_ROOT + PREFIX) else name


def _of_one_adapter(names: dict[str, str], file: Path) -> dict[str, str]:
    """Without the name of the adapter: that of the only one there, or of `default`; another's are left as they are."""
    matches = {name: _SAVED.fullmatch(short) or _ADAPTER.fullmatch(short) for name, short in names.items()}
    adapters = {match["adapter"] for match in matches.values() if match}
    if not adapters or ("default" not in adapters and any(map(_WITHOUT_NAME.fullmatch, names.values()))):
        return names
    if len(adapters) > 1 and "default" not in adapters:
        raise InputError(f"{file}: holds several adapters ({', '.join(sorted(adapters))}): keep one of them in a file")
    one = "default" if "default" in adapters else adapters.pop()
    return {
        name: _joined(match) if (match := matches[name]) and match["adapter"] == one else short
        for name, short in names.items()
    }


def _joined(match: re.Match[str]) -> str:
    return match["head"] + ("." if match.re is _SAVED else "") + match["tail"]


def _today(names: dict[str, str]) -> dict[str, str]:
    """By the names that models have now, where a text model's own tell that they are old ones."""
    if not any(_root(short).startswith(_MOVED[0][0]) for short in names.values()):
        return names
    moved = [*_MOVED, *((prefix, f"model.{prefix}") for prefix in _MOVED_WITH_IT)]
    return {name: _with_root(short, _renamed(_root(short), moved)) for name, short in names.items()}


def _renamed(name: str, moved: Iterable[tuple[str, str]]) -> str:
    return next((new + name.removeprefix(old) for old, new in moved if name.startswith(old)), name)
