"""Train tiny-llama a little on arithmetic: `python -m lorabench.data.builtin.warm_start` makes `tiny-llama-arithmetic`.

Where reinforcement learning begins: from `tiny-llama` itself no answer is ever right, and so nothing is rewarded.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from lorabench.config.decode import decode
from lorabench.data.builtin.collect import HERE
from lorabench.data.builtin.pretrain import command
from lorabench.models.base_model import load_base
from lorabench.spec.run_spec import RunSpec
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute

SPEC: dict[str, Any] = {
    "model": "builtin:tiny-llama",
    "method": {"name": "full"},
    "task": {
        "name": "completion",
        "data": "builtin:arithmetic",
        "generate": {"max_new_tokens": 32, "metrics": ["exact_match"], "answer": r"=(-?\d+)"},
    },
    "seq_len": 64,
    "batch_size": 16,
    "steps": 300,
    "lr": 3e-3,
    "seed": 7,
    "serving": False,
}


def warm_start(out: Path, steps: int) -> None:
    """Train, and save an ordinary Hugging Face folder, in bfloat16: half the bytes, and a start like any other."""
    spec = decode(RunSpec, SPEC | {"steps": steps})
    with tempfile.TemporaryDirectory() as root:
        store = Store(Path(root))
        execute(spec, store, Options(device="cpu", log_to_file=False))
        record = store.read(spec.id)
        if record is None or record.error:
            raise SystemExit(record.error if record else "the run has left no record")
        model = spec.method.load(load_base(spec, torch.device("cpu"), {}), store.folder(spec.id) / "updates", spec)
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # else its owner's alone
    for file in (HERE / "tiny-llama").glob("tokenizer*.json"):
        shutil.copy(file, out)
    measures = {name: round(record.measures[name], 5) for name in ("test_exact_match", "valid_loss", "test_loss")}
    about = {"spec": SPEC | {"steps": steps}, "torch": torch.__version__, "measures": measures}
    (out / "training.json").write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about, indent=2))


if __name__ == "__main__":
    command(__doc__, "tiny-llama-arithmetic", SPEC["steps"], warm_start)
