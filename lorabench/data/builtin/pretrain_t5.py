"""Train the built-in tiny-t5 from nothing on english-docs: `python -m lorabench.data.builtin.pretrain_t5`.

It is given a text with gaps and writes it whole: the text infilling of BART (Lewis et al. 2020, arXiv
1910.13461, section 2.2). T5's own span corruption asks for the gaps alone, and so never for a copy of what was read.
"""

import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from lorabench.data.builtin.pretrain import (
    SEED,
    VOCABULARY,
    blocks,
    command,
    random_pieces,
    save,
    texts,
    token_stream,
    train,
    train_tokenizer,
)

STEPS = 3000
BLOCK = 48
BATCH = 16
PART = 12
LONGEST_GAP = 6


def new_model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """0.92 million parameters, of which the embedding, that reads on both sides and writes, has 0.13.

    Each dimension but the heads' of the position biases is a multiple of 32, so that blocks of 4-bit quantization fit.
    """
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,  # type: ignore[call-arg]
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def with_a_gap(parts: Tensor, mark: int, generator: torch.Generator) -> Tensor:
    """`(batch, part)` with 1 to `LONGEST_GAP` tokens of each row, as many in all, replaced by one `mark`."""
    length = int(torch.randint(1, LONGEST_GAP + 1, (), generator=generator))
    kept = parts.shape[1] - length + 1
    starts = torch.randint(kept, (len(parts), 1), generator=generator)
    places = torch.arange(kept)
    return parts.gather(1, places + (places > starts) * (length - 1)).scatter(1, starts, mark)


def batches(pieces: Iterator[Tensor], tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, Tensor]]:
    """Of each `(batch, block)` what the encoder reads, a gap in each `PART`, and the whole with its end to write."""
    generator, mark = torch.Generator().manual_seed(SEED), tokenizer.bos_token_id  # else a document's start
    for piece in pieces:
        end = torch.full((len(piece), 1), tokenizer.eos_token_id)
        source = [with_a_gap(part, mark, generator) for part in piece.split(PART, 1)]
        yield {"input_ids": torch.cat(source, 1), "labels": torch.cat([piece, end], 1)}


@torch.no_grad()
def mean_loss(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, name: str, split: str) -> float:
    """Cross-entropy in nats a token of the whole, over a split cut into blocks; the gaps are the same each time."""
    model.eval()
    parts = blocks(token_stream(tokenizer, texts(name, split)), BLOCK)
    cut = batches(iter(parts.split(64)), tokenizer)
    return sum(model(**batch).loss.item() * len(batch["labels"]) for batch in cut) / len(parts)


def fit(steps: int) -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerFast]:
    """The trained model and its tokenizer: tiny-llama's, being trained on the same documents."""
    torch.manual_seed(SEED)
    documents = texts("english-docs", "train")
    tokenizer = train_tokenizer(documents)
    stream = token_stream(tokenizer, documents)
    model = new_model(tokenizer)
    print(f"{model.num_parameters()} parameters, {len(stream)} tokens")
    pieces = random_pieces(stream, steps, BATCH, BLOCK)
    train(model, batches(pieces, tokenizer), steps, lambda: mean_loss(model, tokenizer, "english-docs", "validation"))
    return model, tokenizer


def pretrain(out: Path, steps: int) -> None:
    """Train, save in bfloat16, half the bytes, and record under `out` what the saved weights give."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    model, tokenizer = fit(steps)
    seconds = time.perf_counter() - started
    save(model.bfloat16(), tokenizer, out)
    parts = [("english-docs", "validation"), ("english-docs", "test"), ("python-code", "validation")]
    record = {
        "seed": SEED,
        "steps": steps,
        "tokens": steps * BATCH * BLOCK,
        "block": BLOCK,
        "part": PART,
        "longest_gap": LONGEST_GAP,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "losses": {"/".join(part): round(mean_loss(model.float(), tokenizer, *part), 5) for part in parts},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    command(__doc__, "tiny-t5", STEPS, pretrain)
