import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lorabench.data.builtin import pretrain, pretrain_t5
from lorabench.data.builtin.collect import HERE

MODEL = HERE / "tiny-t5"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def loaded():
    return AutoModelForSeq2SeqLM.from_pretrained(MODEL, dtype=torch.float32, output_loading_info=True)


@pytest.fixture(scope="module")
def pieces(tokenizer) -> torch.Tensor:
    stream = pretrain.token_stream(tokenizer, pretrain.texts("english-docs", "validation"))
    return pretrain.blocks(stream, pretrain_t5.BLOCK)


def test_its_files_are_small_and_its_shapes_suit_4_bit_blocks(loaded):
    model, report = loaded
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 2_000_000
    assert not any(report.values())
    assert model.lm_head.weight is model.shared.weight
    width, inner, buckets = 128, 256, 32
    block, feed_forward = 4 * width * width + width, 3 * width * inner + width  # with their norms
    sides = 2 * (block + feed_forward) + 2 * (2 * block + feed_forward) + 2 * (width + buckets * 4)
    assert model.num_parameters() == 1024 * width + sides
    assert all(size % 32 == 0 for name, p in model.named_parameters() if "relative" not in name for size in p.shape)
    assert {each.dtype for each in load_file(MODEL / "model.safetensors").values()} == {torch.bfloat16}


def test_it_was_made_by_the_script_as_it_stands(loaded, tokenizer):
    model, about = loaded[0], json.loads((MODEL / "training.json").read_text())
    for name in ("seed", "steps", "block", "part", "longest_gap"):
        assert about[name] == getattr(pretrain_t5, name.upper())
    found = pretrain_t5.mean_loss(model, tokenizer, "english-docs", "validation")
    assert found == pytest.approx(about["losses"]["english-docs/validation"], abs=1e-3)


def test_a_gap_is_one_mark_and_leaves_all_else():
    generator, lengths = torch.Generator().manual_seed(3), set()
    pieces = torch.arange(100, 400).view(-1, pretrain_t5.PART)
    for _ in range(60):
        found = pretrain_t5.with_a_gap(pieces, 0, generator).tolist()
        for piece, source in zip(pieces.tolist(), found, strict=True):
            before = source.index(0)
            behind = len(source) - before - 1
            assert [*piece[:before], 0, *piece[len(piece) - behind :]] == source
        lengths.add(len(piece) - len(source) + 1)
    assert lengths == set(range(1, pretrain_t5.LONGEST_GAP + 1))
    assert len({source.index(0) for source in found}) > 1


def test_it_learns_to_write_the_whole_with_its_end(tokenizer, pieces):
    (batch,) = pretrain_t5.batches(iter([pieces[1:3]]), tokenizer)
    marks = pretrain_t5.BLOCK // pretrain_t5.PART
    assert (batch["input_ids"] == tokenizer.bos_token_id).sum(1).tolist() == [marks, marks]
    assert batch["labels"].tolist() == [[*piece, tokenizer.eos_token_id] for piece in pieces[1:3].tolist()]


def test_it_writes_what_it_reads(loaded, pieces):
    """Of texts that it was not trained on; given the text beside, it can only guess how each goes on."""
    model, pieces = loaded[0].eval(), pieces[:64]
    with torch.no_grad():
        own, other = (model(input_ids=read, labels=pieces).logits.argmax(-1) for read in (pieces, pieces.roll(1, 0)))
    assert (own == pieces).float().mean() > 0.9 > 0.3 > (other == pieces).float().mean()


def test_pretraining_is_bit_identical_and_makes_the_shipped_files(one_thread, tmp_path):
    for name in ("first", "second"):
        pretrain.save(*pretrain_t5.fit(steps=2), tmp_path / name)
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("first", "second"))
    assert "model.safetensors" in first and first == second
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert first[name].replace(b"float32", b"bfloat16") == (MODEL / name).read_bytes()
