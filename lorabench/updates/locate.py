"""Where an adapter or a base lies: a path, a run of lorabench, `builtin:NAME`, or an id of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lorabench.config.decode import InputError
from lorabench.config.quote import clip, show_path
from lorabench.data.dataset import BUILTIN

ADAPTER_PATTERNS = [
    "*adapter_config.json", "*adapter_model.*", "*pytorch_adapter.bin", "*adapters.safetensors", "*adapter_[0-9]*",
    "*adapter_model-*", "*lora*.safetensors", "*lora*.bin", "*lora*.pt", "*lora*.gguf", "*adapter*.gguf",
]  # fmt: skip
"""Files of adapters, in whichever folder of a repository."""
WEIGHT_PATTERNS = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
OLD_WEIGHT_PATTERNS = ["config.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"]
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)+")


def adapter_path(source: str | Path) -> Path:
    """The file or folder that `source` means; from the Hub, its adapter files alone are fetched.

    Of a run (`results/runs/<id>`), its `updates`. `OWNER/NAME/FOLDER` is a folder of a repository. InputError where
    there is nothing, or the Hub cannot be reached.
    """
    path = Path(os.path.expanduser(source))
    if os.path.exists(path):  # False also of a name that no file system takes
        is_run = (path / "spec.json").is_file() and (path / "updates").is_dir()
        return path / "updates" if is_run else path
    if not _is_hub_id(source):
        raise InputError(f"{show_path(source)}: no such file or folder{_beside(path)}")
    owner, name, *folders = str(source).split("/")
    root = _download(f"{owner}/{name}", None, ADAPTER_PATTERNS)
    path = root.joinpath(*folders)
    if not path.exists():
        raise InputError(f"{source}: {owner}/{name} has no adapter there{_beside(path)}")
    return path


def weights_path(source: str | Path, revision: str | None = None) -> Path:
    """The file or folder of a base's weights; from the Hub, its safetensors (or, where it has none, its `.bin`)."""
    text = str(source)
    path = BUILTIN / text.removeprefix("builtin:") if text.startswith("builtin:") else Path(os.path.expanduser(source))
    if os.path.exists(path):
        return _denoiser(path)
    if text.startswith("builtin:") or not _is_hub_id(source) or text.count("/") > 1:
        built_in = ", ".join(sorted(f"builtin:{file.parent.name}" for file in BUILTIN.glob("*/config.json")))
        raise InputError(f"{show_path(source)}: no such file or folder of weights. Built in: {built_in}")
    folder = _download(text, revision, WEIGHT_PATTERNS)
    return folder if list(folder.glob("*.safetensors")) else _download(text, revision, OLD_WEIGHT_PATTERNS)


def _denoiser(path: Path) -> Path:
    """Of a pipeline of diffusers the folder of its denoiser; any other as it is."""
    found = (path / part for part in ("unet", "transformer")) if (path / "model_index.json").is_file() else iter(())
    return next((folder for folder in found if folder.is_dir()), path)


def adapter_folders(path: Path) -> list[str]:
    """Names of the sub-folders that hold an adapter each, as PEFT saves several."""
    if not os.path.isdir(path):
        return []
    return sorted(folder.name for folder in path.iterdir() if (folder / "adapter_config.json").is_file())


def _beside(path: Path) -> str:
    names = adapter_folders(path.parent)
    return f"; {path.parent} has the adapters {', '.join(names)}" if names else ""


def _is_hub_id(source: str | Path) -> bool:
    return bool(_HUB_ID.fullmatch(str(source))) and not os.path.exists(str(source).partition("/")[0])


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # slow to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{show_path(repository)}: no such file or folder, and not to be had from the Hugging Face Hub: "
            f"{clip(reason, 160)}"
        ) from None
