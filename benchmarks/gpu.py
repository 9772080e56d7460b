"""All that needs a GPU, in one call of under nine minutes: LoRA on Llamas of 1B, 3B and 8B shape, and the SVDs of ΔW.

The models have random weights, so nothing is downloaded; data are the built-in texts. Each section is left out once the
time is over, and says so.

    python benchmarks/gpu.py                     # on a GPU of 80 GB; several GPUs: FSDP too
    python benchmarks/gpu.py --device cpu        # tiny shapes: a look at whether all of it works
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import analysis
import torch
from contenders import Race as Contender
from contenders import peak_bytes, reset_peak, run_trainer
from hardware import write
from packing import Race, make_spec
from relay import Stopwatch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.utils.logging import disable_progress_bar

from lorabench.models.base_model import BUILTIN
from lorabench.spec.run_spec import RunSpec, method_seed
from lorabench.store.store import Store
from lorabench.training import predictions
from lorabench.training.base import SharedBase
from lorabench.training.examples import prepare
from lorabench.training.passes import autocast
from lorabench.training.step import Pass

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 2048},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""Of the Llama 3 models."""
SECONDS = 400.0
"""After which no section is begun."""
TOLERANCE = 2e-2
"""Largest relative difference of two contenders' losses after the same steps."""


def llama(shape: str, device: torch.device) -> nn.Module:
    """A Llama of random weights in bfloat16, made where it is used."""
    config = LlamaConfig(**SHAPES[shape], pad_token_id=2, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False)
    torch.manual_seed(0)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def to_nf4(model: nn.Module) -> nn.Module:
    """The linear layers of the blocks as bitsandbytes quantizes them."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in [*model.named_modules()]:
        if type(linear) is nn.Linear and name != "lm_head":
            with torch.device("meta"):
                quantized = Linear4bit(linear.in_features, linear.out_features, False, torch.bfloat16, True, "nf4")
            weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
            quantized.weight = weight.to(linear.weight.device)
            model.set_submodule(name, quantized)
    return model


def base_of(model: nn.Module, examples: int, tokens: int, device: torch.device, quantization: str) -> SharedBase:
    more = {"dtype": "bfloat16", "quantization": quantization, "lr": 1e-4, "warmup": 0.0, "schedule": "constant"}
    spec = make_spec("builtin:tiny-llama", examples, tokens, **more)  # its tokens are among those of the larger ones
    return SharedBase(spec=spec, stages=[prepare(spec)], device=device, whole=model)


class Plain:
    """The loop that people write, on the same base, with the batch of the run of seed 0."""

    def __init__(self, race: Race, base: SharedBase):
        self.spec, self.device = base.spec, base.device
        request = race.seats[0].request
        assert isinstance(request, Pass)
        self.batch = {key: tensor.to(self.device) for key, tensor in request.parts[0].items() if key != "places"}
        self.model = attached(base)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.spec.lr, weight_decay=0.0, fused=True)
        self.model.train()

    def step(self) -> None:
        with autocast(self.spec, self.device):
            loss = self.model(**self.batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> float:
        return loss_of(self.model, self.spec, self.batch)


def attached(base: SharedBase) -> nn.Module:
    model = base.load()
    torch.manual_seed(method_seed(base.spec))
    return base.spec.method.attach(model, base.spec)


@torch.no_grad()
def loss_of(model: nn.Module, spec: RunSpec, batch: dict[str, torch.Tensor]) -> float:
    with autocast(spec, next(iter(batch.values())).device):
        return float(model(**batch).loss)


def timed(step: Callable[[], None], tokens: int, steps: int, device: torch.device) -> dict[str, float]:
    """Tokens/s and peak memory of so many steps, two for warming up before them."""
    step(), step()
    reset_peak(device)
    begin = synchronized(device)
    for _ in range(steps):
        step()
    seconds = synchronized(device) - begin
    return {"tokens_per_second": tokens * steps / seconds, "peak_gib": peak_bytes(device) / 2**30}


def synchronized(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def training(shape: str, sizes: list[int], arguments: argparse.Namespace, quantization: str = "none") -> dict[str, Any]:
    """A step alone, in packs, by a PEFT loop, by HF Trainer, and alone with the logits of all positions at once."""
    device = torch.device(arguments.device)
    model = llama(shape, device)
    model = to_nf4(model) if quantization == "nf4" else model
    base = base_of(model, arguments.examples, arguments.tokens, device, quantization)
    tokens, found = arguments.examples * arguments.tokens, {}
    time_of = partial(timed, steps=arguments.steps, device=device)
    race = Race(base, 1)
    plain = Plain(race, base)
    found["lorabench"] = time_of(race.alone, tokens)
    found["peft_loop"] = time_of(plain.step, tokens)
    ours = loss_of(race.trainings[0].model, base.spec, plain.batch)
    apart = abs(ours / plain.loss() - 1)
    assert apart < TOLERANCE, f"{shape}: the losses differ by {apart:.2g}: this is not the same work"
    del plain
    before, predictions.CHUNK_BYTES = predictions.CHUNK_BYTES, dict.fromkeys(("cpu", "cuda"), 2**60)
    found["lorabench, unchunked"] = time_of(race.alone, tokens)
    predictions.CHUNK_BYTES = before
    del race
    found["trainer"] = trainer(base, arguments)
    for size in sizes:
        freed()
        try:
            found[f"lorabench, pack of {size}"] = time_of(Race(base, size).pack, size * tokens)
        except torch.OutOfMemoryError as error:
            found[f"lorabench, pack of {size}"] = {"out_of_memory": str(error).partition(".")[0]}
    chunked = found["lorabench"]["peak_gib"] / found["lorabench, unchunked"]["peak_gib"]
    return {"contenders": found, "loss_difference": apart, "peak_of_unchunked": chunked}


def trainer(base: SharedBase, arguments: argparse.Namespace) -> dict[str, float]:
    """HF Trainer on as many steps: the first half for warming up."""

    class Given(Contender):
        def model(self) -> nn.Module:
            return attached(base)

    steps = {"steps": 2 * arguments.steps}
    spec = type(base.spec).from_json(base.spec.to_json() | steps)
    watch = Stopwatch(arguments.steps, base.device, on_warm=partial(reset_peak, base.device))
    run_trainer(Given(spec, base.stages[0], watch))
    tokens = arguments.steps * arguments.examples * arguments.tokens
    return {"tokens_per_second": tokens / watch.seconds[0], "peak_gib": peak_bytes(base.device) / 2**30}


def freed() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


SWEEP = """
[base]
model = "{model}"
task.name = "text"
task.max_eval = 4
dtype = "bfloat16"
method.name = "lora"
seq_len = {tokens}
batch_size = {batch}
steps = 20
serving = false
keep = "none"
"""


def fsdp(shape: str, processes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run over all GPUs, its base shared out among them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        llama(shape, torch.device(arguments.device)).save_pretrained(root / "model")
        AutoTokenizer.from_pretrained(BUILTIN / "tiny-llama").save_pretrained(root / "model")
        freed()
        batch = processes * arguments.examples
        text = SWEEP.format(model=root / "model", tokens=arguments.tokens, batch=batch)
        (root / "fsdp.toml").write_text(text)
        options = ["--results", str(root / "results"), "--processes", str(processes), "--sharding", "fsdp"]
        subprocess.run([sys.executable, "-m", "lorabench", "run", str(root / "fsdp.toml"), *options], check=True)
        (state,) = Store(root / "results").states()
        assert state.record is not None
        keys = ("tokens_per_second", "peak_gib", "step_seconds_median")
        return {"processes": processes} | {key: state.record.measures[key] for key in keys}


def sections(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    shapes, d = arguments.shapes, arguments.size
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"lora_{shape}": partial(training, shape, arguments.packs, arguments) for shape in shapes
    }
    if importlib.util.find_spec("bitsandbytes"):
        found[f"qlora_{shapes[-1]}"] = partial(training, shapes[-1], arguments.packs[:1], arguments, "nf4")
    found["dense_top_16"] = partial(analysis.dense_top, d, 16, arguments)
    found["dense_values"] = partial(analysis.dense_values, d, arguments)
    found["intruders"] = partial(analysis.intruders, d, arguments)
    if (count := torch.cuda.device_count()) > 1:
        found[f"fsdp_{shapes[0]}"] = partial(fsdp, shapes[0], count, arguments)
    return found


def main() -> None:
    begin = time.monotonic()
    arguments = parse()
    disable_progress_bar()
    figures: dict[str, Any] = {}
    left_out: list[str] = []
    for name, measure in sections(arguments).items():
        if time.monotonic() - begin > arguments.seconds:
            left_out.append(name)
            continue
        freed()
        figures[name] = measure()
        print(name, json.dumps(figures[name].get("contenders") or analysis.brief(figures[name])), flush=True)
    settings = {key: value for key, value in vars(arguments).items() if key != "device"}
    print(write("gpu", arguments.device, settings, {"sections": figures, "left_out": left_out}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: 8B 1B 3B; tiny on a CPU")
    parser.add_argument("--packs", nargs="+", type=int, default=[4, 8], help="runs in a pack")
    parser.add_argument("--examples", type=int, default=2, help="of a run's batch")
    parser.add_argument("--tokens", type=int, help="of an example (default: 1024; 32 on a CPU)")
    parser.add_argument("--size", type=int, help="of the dense matrices (default: 4096; 128 on a CPU)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="of the SVDs")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no section is begun")
    arguments = parser.parse_args()
    is_gpu = arguments.device == "cuda"
    if is_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU; --device cpu looks at tiny shapes")
    arguments.shapes = arguments.shapes or (["8B", "1B", "3B"] if is_gpu else ["tiny"])
    arguments.tokens = arguments.tokens or (1024 if is_gpu else 32)
    arguments.size = arguments.size or (4096 if is_gpu else 128)
    return arguments


if __name__ == "__main__":
    main()
