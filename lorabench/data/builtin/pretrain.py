"""Train the built-in tiny-llama from nothing on english-docs: `python -m lorabench.data.builtin.pretrain`.

One seed, one thread and deterministic kernels: on one machine, the same command gives the same weights.
"""

import argparse
import gzip
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lorabench.data.builtin.collect import HERE, write_fingerprints

# Names that no document holds, so that encoding a text never makes one of them.
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCABULARY = 1024
SEED = 0
STEPS = 5000
BLOCK = 256
BATCH = 2
PEAK_LR = 3e-3
WARMUP_STEPS = 200
FINAL_LR_SHARE = 0.05
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0


def texts(name: str, split: str) -> list[str]:
    """The documents of one split of a built-in data set."""
    with gzip.open(HERE / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every byte is in the alphabet, so any text encodes and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """0.92 million parameters; grouped-query attention, so `k_proj` and `v_proj` are not square.

    Each dimension is a multiple of 32, so that blocks of 4-bit quantization fit.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """All documents in one line, each between `BOS` and `EOS`: `(num_tokens,)`."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer(documents, verbose=False).input_ids
    return torch.tensor([token for ids in encoded for token in (bos, *ids, eos)])


def blocks(stream: Tensor, block: int = BLOCK) -> Tensor:
    """The stream cut into `(num_blocks, block)`; the rest that fills no block is left out."""
    return stream[: len(stream) // block * block].view(-1, block)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream_blocks: Tensor) -> float:
    """Cross-entropy in nats a token; each block predicts all its tokens but the first."""
    model.eval()
    total = sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in stream_blocks.split(16))
    return total / len(stream_blocks)


def random_pieces(stream: Tensor, steps: int, batch: int, block: int) -> Iterator[Tensor]:
    """`(batch, block)` pieces of the stream from random starts, for each step."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        starts = torch.randint(len(stream) - block, (batch, 1), generator=generator)
        yield stream[starts + torch.arange(block)]


def lr_share(step: int, steps: int) -> float:
    """Linear warm-up to 1, then a cosine down to `FINAL_LR_SHARE`."""
    warmup = min(WARMUP_STEPS, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_for(model: nn.Module, peak_lr: float = PEAK_LR) -> torch.optim.AdamW:
    """Weight decay on matrices, none on the norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)


def train(
    model: nn.Module,
    batches: Iterator[dict[str, Tensor]],
    steps: int,
    validate: Callable[[], float],
    peak_lr: float = PEAK_LR,
    after: Callable[[], object] = lambda: None,
) -> None:
    """The loop, with something to do `after` each step; prints the training and validation loss from time to time."""
    optimizer = optimizer_for(model, peak_lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, steps))
    for step, batch in enumerate(batches, start=1):
        model.train()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        after()
        if step % 500 == 0:
            print(f"step {step}: {loss.item():.4f}, validation {validate():.4f}", flush=True)


def losses(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """The loss on each part that `training.json` records; the first 16 blocks are for a quick check."""
    found = {}
    for name, split in [
        ("english-docs", "train"),
        ("english-docs", "validation"),
        ("english-docs", "test"),
        ("python-code", "validation"),
    ]:
        parts = blocks(token_stream(tokenizer, texts(name, split)))
        found[f"{name}/{split}"] = mean_loss(model, parts)
        found[f"{name}/{split}/first_16_blocks"] = mean_loss(model, parts[:16])
    return found


def fit(steps: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, Tensor]:
    """The trained model, its tokenizer and the tokens it saw."""
    torch.manual_seed(SEED)
    documents = texts("english-docs", "train")
    tokenizer = train_tokenizer(documents)
    stream = token_stream(tokenizer, documents)
    validation = blocks(token_stream(tokenizer, texts("english-docs", "validation")))
    model = new_model(tokenizer)
    print(f"{model.num_parameters()} parameters, {len(stream)} tokens, {len(validation)} validation blocks")
    pieces = ({"input_ids": piece, "labels": piece} for piece in random_pieces(stream, steps, BATCH, BLOCK))
    train(model, pieces, steps, lambda: mean_loss(model, validation))
    return model, tokenizer, stream


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """An ordinary Hugging Face folder."""
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that transformers 4 does not know; both read this one.
    settings = out / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    model.save_pretrained(out)
    # safetensors makes its file private to its owner.
    (out / "model.safetensors").chmod(0o644)


def pretrain(out: Path, steps: int) -> None:
    """Train, save and record under `out`."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    model, tokenizer, stream = fit(steps)
    seconds = time.perf_counter() - started
    save(model, tokenizer, out)
    record = {
        "seed": SEED,
        "steps": steps,
        "tokens": steps * BATCH * BLOCK,
        "train_tokens": len(stream),
        "block": BLOCK,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "losses": {name: round(loss, 5) for name, loss in losses(model, tokenizer).items()},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def command(about: str, name: str, steps: int, make: Callable[[Path, int], None]) -> None:
    """The command line of a script that makes the built-in model `name`, in so many steps if not told otherwise."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / name, help="where the model goes")
    parser.add_argument("--steps", type=int, default=steps, help="fewer: an earlier model, or a test")
    arguments = parser.parse_args()
    make(arguments.out, arguments.steps)
    if arguments.out.resolve().parent == HERE.resolve():
        write_fingerprints()


if __name__ == "__main__":
    command(__doc__, "tiny-llama", STEPS, pretrain)
