"""Warms the fork server up when it imports this: what the runs of a sweep share is read once, and inherited.

Loading a first model makes transformers and PEFT import and compute a good deal, and tokenizing a data set takes
longer than many short runs; both are done here, in one thread, for what lies on this machine.
"""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path

import torch

from lorabench.launch.worker import WARM_VARIABLE
from lorabench.models.base_model import load_base, resolve
from lorabench.spec.run_spec import RunSpec
from lorabench.training.examples import prepare_stages

LARGEST_BYTES = 200e6


def warm(spec: RunSpec) -> None:
    """Tokenize the run's data, and load its base and attach its method once where that is quick."""
    if not _is_local(spec):
        return
    examples = prepare_stages(spec)[0]
    folder = Path(resolve(spec.model))
    if sum(file.stat().st_size for file in folder.glob("*.safetensors")) < LARGEST_BYTES:
        base = load_base(spec, torch.device("cpu"), examples.model_options, exact=True)
        spec.method.attach(base, spec)


def _is_local(spec: RunSpec) -> bool:
    """Whether reading it starts no threads, which a fork would not survive: no Hub, no parquet."""
    named = [source for task in spec.stages for source in task.sources().values()]
    sources = [Path(source) for source in named if not source.startswith("builtin:")]
    files = [file for path in sources for file in ([path] if path.is_file() else path.glob("*"))]
    here = all(path.exists() for path in sources) and not any(file.suffix == ".parquet" for file in files)
    return here and Path(resolve(spec.model)).is_dir()


def _main() -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for table in json.loads(os.environ.pop(WARM_VARIABLE, "[]")):
        try:
            warm(RunSpec.from_json(table))
        except Exception:  # whatever is wrong, the run itself meets it and says so in its record
            traceback.print_exc()
    del os.environ["TOKENIZERS_PARALLELISM"]


_main()
