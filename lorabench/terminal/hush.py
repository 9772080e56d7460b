"""What libraries have to say to their own developers, left out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""For the environment before the library is imported: else a report for each load that the head is a new one."""


def hush_libraries() -> None:
    """For good: of a process that is lorabench's own."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    _hush()


@contextmanager
def hushed() -> Iterator[None]:
    """Inside alone: of a person's own process, whose settings stay."""
    import logging

    logger = logging.getLogger("bitsandbytes")
    level, added = logger.level, {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ.update(added)
    with warnings.catch_warnings():
        _hush()
        try:
            yield
        finally:
            logger.setLevel(level)
            for name in added:
                os.environ.pop(name, None)


def _hush() -> None:
    import logging

    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", "IProgress not found")  # tqdm's, of a notebook without widgets
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
