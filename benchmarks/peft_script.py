"""One cell of `grid.py` as people write it: a script with PEFT and a plain loop, which imports nothing of lorabench.

It is given a table of settings as JSON, trains, evaluates and saves the adapter, and writes its validation loss.
"""

import gzip
import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def blocks(file, tokenizer, length, most=None):
    """The running text of a file, cut into pieces of so many tokens."""
    start = tokenizer("")["input_ids"]
    size, stream, found = length - len(start), [], []
    with gzip.open(file, "rt") as lines:
        for line in lines:
            stream += [
                *tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ]
            while len(stream) >= size and (most is None or len(found) < most):
                found.append([*start, *stream[:size]])
                del stream[:size]
    return torch.tensor(found)


def order(size, count, seed):
    """The first so many examples, each epoch shuffled by its own seed."""
    found, epoch = [], 0
    while len(found) < count:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        found += torch.randperm(size, generator=generator).tolist()
        epoch += 1
    return found[:count]


def main(given):
    torch.set_num_threads(1)
    device, batch, steps = given["device"], given["batch_size"], given["steps"]
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    folder = Path(given["data"])
    train = blocks(folder / "train.jsonl.gz", tokenizer, given["seq_len"])
    valid = blocks(folder / "validation.jsonl.gz", tokenizer, given["seq_len"], given["max_eval"])
    model = AutoModelForCausalLM.from_pretrained(given["model"]).to(device)
    torch.manual_seed(given["init_seed"])
    config = LoraConfig(r=given["rank"], lora_alpha=2 * given["rank"], target_modules="all-linear", lora_dropout=0.0)
    model = get_peft_model(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=given["lr"], weight_decay=0.0, fused=True)
    warm = given["warmup_steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / warm if step < warm else 1 - (step - warm) / (steps - warm)
    )
    visited = order(len(train), steps * batch, given["seed"])
    model.train()
    for step in range(steps):
        ids = train[visited[step * batch : (step + 1) * batch]].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(step, float(loss))
    model.eval()
    with torch.no_grad():
        losses = [float(model(input_ids=ids, labels=ids).loss) for ids in valid.to(device).split(batch)]
    out = Path(given["out"])
    model.save_pretrained(out)
    (out / "result.json").write_text(json.dumps({"valid_loss": sum(losses) / len(losses)}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
