"""Answers to prompts: lorabench's batches beside one `generate` of transformers for each prompt.

The built-in model with a LoRA on it, prompts of 8 to 64 tokens, greedy, 32 new tokens each, in float32. The two take
turns; the texts must be the same.

    python benchmarks/generation.py                 # about 4 minutes on 2 CPU cores
    python benchmarks/generation.py --device cuda --prompts 256 --batch 64
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from hardware import spread, write

from lorabench.config.decode import decode
from lorabench.models.base_model import load_base, load_tokenizer
from lorabench.spec.generate import Generate
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.task import Prompt
from lorabench.training.generation import answers, until

SPEC = {"method": {"name": "lora", "rank": 8}, "task": {"name": "text"}, "threads": 2}


def one_by_one(model: torch.nn.Module, tokenizer: object, prompts: list[Prompt], new_tokens: int) -> list[str]:
    """As transformers' documentation has it."""
    found = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.ids.astype(np.int64))[None].to(next(model.parameters()).device)
        with torch.no_grad():
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                use_cache=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        tokens = until(written[0, ids.shape[1] :].tolist(), tokenizer.eos_token_id)
        found.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(SPEC["threads"])
    spec, device = decode(RunSpec, SPEC), torch.device(arguments.device)
    tokenizer = load_tokenizer(spec.model, spec.revision)
    torch.manual_seed(0)
    model = spec.method.attach(load_base(spec, device, {}), spec).to(device).eval()
    for parameter in model.parameters():  # so that the adapter does something
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    generator = np.random.default_rng(0)
    prompts = [
        Prompt(
            ids=generator.integers(3, len(tokenizer), generator.integers(8, 65)).astype(np.int32), text="", reference=""
        )
        for _ in range(arguments.prompts)
    ]
    generate = Generate(max_new_tokens=arguments.new_tokens, batch_size=arguments.batch)
    calls = {
        "lorabench": lambda: [answer.output for answer in answers(model, spec, generate, prompts)],
        "one_by_one": lambda: one_by_one(model, tokenizer, prompts, arguments.new_tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    same = 0
    for number in range(arguments.rounds + 1):  # the first warms up
        texts = {}
        for name in sorted(calls, reverse=number % 2 == 0):
            begin = time.perf_counter()
            texts[name] = calls[name]()
            seconds[name].append(time.perf_counter() - begin)
        same = sum(ours == theirs for ours, theirs in zip(texts["lorabench"], texts["one_by_one"], strict=True))
    ratios = [theirs / ours for ours, theirs in zip(seconds["lorabench"][1:], seconds["one_by_one"][1:], strict=True)]
    figures = {name: spread(values[1:]) for name, values in seconds.items()} | {"ratio": spread(ratios), "same": same}
    print(f"{figures['ratio']['median']:.1f} x as fast as one by one; {same} of {len(prompts)} texts the same")
    settings = {key: value for key, value in vars(arguments).items() if key != "device"}
    print(write("generation", device.type, settings, {"figures": figures}))


if __name__ == "__main__":
    main()
