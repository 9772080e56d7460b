import gzip
import json
import math
import os
import platform
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lorabench.data.builtin import collect, pretrain
from lorabench.data.builtin.collect import HERE, SPLITS, Document

SETS = ("english-docs", "python-code")
MODEL = HERE / "tiny-llama"
MADE_BY = "3.11.7"


def documents(name: str, split: str) -> list[Document]:
    with gzip.open(HERE / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


@pytest.fixture(scope="module")
def every_split() -> dict[tuple[str, str], list[Document]]:
    return {(name, split): documents(name, split) for name in SETS for split in SPLITS}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((MODEL / "training.json").read_text())


def test_fingerprints_match_the_files():
    assert json.loads((HERE / "fingerprints.json").read_text()) == collect.fingerprints()


def test_readme_lists_the_fingerprints():
    readme = (HERE / "README.md").read_text()
    assert all(f"{digest}  {path}" in readme for path, digest in collect.fingerprints().items())


def test_shipped_files_are_small():
    data = sum(path.stat().st_size for path in HERE.glob("*/*.jsonl.gz"))
    model = sum(path.stat().st_size for path in MODEL.iterdir())
    assert data < 1_600_000
    assert model < 4_000_000


def test_no_document_stands_twice(every_split):
    sources = [d.source for part in every_split.values() for d in part]
    texts = [d.text for part in every_split.values() for d in part]
    assert len(set(sources)) == len(sources)
    assert len(set(texts)) == len(texts)


def test_no_module_gives_both_prose_and_code(every_split):
    modules = {
        name: {d.source.split(":")[1] for split in SPLITS for d in every_split[name, split] if "topic:" not in d.source}
        for name in SETS
    }
    assert not modules["english-docs"] & modules["python-code"]


def test_no_line_stands_in_both_data_sets(every_split):
    lines = {
        name: {
            line.strip()
            for split in SPLITS
            for d in every_split[name, split]
            for line in d.text.splitlines()
            if len(line.strip()) >= 40
        }
        for name in SETS
    }
    assert not lines["english-docs"] & lines["python-code"]


def test_no_english_paragraph_is_in_two_splits(every_split):
    paragraphs = [p for split in SPLITS for d in every_split["english-docs", split] for p in d.text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)


@pytest.mark.parametrize("name", SETS)
def test_held_out_splits_have_their_share(every_split, name):
    size = {split: sum(len(d.text) for d in every_split[name, split]) for split in SPLITS}
    for split in ("validation", "test"):
        assert size[split] / sum(size.values()) == pytest.approx(collect.HELD_OUT_SHARE, abs=0.01)


@pytest.mark.skipif(platform.python_version() != MADE_BY, reason=f"the data sets come from CPython {MADE_BY}")
def test_collect_makes_the_shipped_documents(every_split):
    from pydoc_data.topics import topics

    collected = collect.collect(Path(sysconfig.get_path("stdlib")), topics)
    assert {(name, split): part for name, parts in collected.items() for split, part in parts.items()} == every_split


def test_jsonl_gz_gives_the_same_bytes(every_split):
    part = every_split["english-docs", "test"]
    data = collect.jsonl_gz(part)
    assert data == collect.jsonl_gz(part)
    assert data[4:8] == bytes(4)  # no time in the header
    assert [Document(**json.loads(line)) for line in gzip.decompress(data).splitlines()] == part


def test_without_docstrings_keeps_the_code():
    source = """\
'''Module.'''
X = '''kept'''

def f():
    '''Gone,
    both lines.'''
    return 1

def g():
    'only'
"""
    kept = """\
X = '''kept'''

def f():
    return 1

def g():
    'only'
"""
    assert collect.without_docstrings(source) == kept


def test_unique_paragraphs_drops_repeats_and_doctests():
    first, second = collect.unique_paragraphs(
        [Document("a", "One.\n\nTwo."), Document("b", "Two.\n\n>>> 1\n1\n\nThree.")]
    )
    assert (first.text, second.text) == ("One.\n\nTwo.", "Three.")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " a  b\t\tc\r\n\n   d ",
        "don 't , n't .",
        "naïve — 漢字 🎉 \u202e \ufffd",
        "<s></s><pad>",
        "".join(map(chr, range(0x300))),
        "def f(x):\n    return {'a': x[1:], **x}  # why\n",
    ],
)
def test_tokenizer_gives_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, verbose=False).input_ids) == text


def test_tokenizer_gives_random_text_and_code_back(tokenizer, every_split):
    noise = os.urandom(20_000).decode("utf-8", errors="replace")
    for text in [noise, *(d.text for d in every_split["python-code", "test"])]:
        assert tokenizer.decode(tokenizer(text, verbose=False).input_ids) == text


def test_tokenizer_knows_every_byte_and_has_its_own_pad(tokenizer):
    assert len(tokenizer) == pretrain.VOCABULARY
    assert set(pretrain.pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.get_vocab())
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_tokenizer_is_the_one_that_pretrain_makes(tokenizer):
    made = pretrain.train_tokenizer(pretrain.texts("english-docs", "train"))
    assert made.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_losses_are_the_recorded_ones(tokenizer, recorded):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    found = {}
    for part in ("english-docs/validation", "python-code/validation"):
        stream = pretrain.token_stream(tokenizer, pretrain.texts(*part.split("/")))
        found[part] = pretrain.mean_loss(model, pretrain.blocks(stream)[:16])
        assert found[part] == pytest.approx(recorded["losses"][f"{part}/first_16_blocks"], abs=1e-3)
    assert found["english-docs/validation"] < 0.6 * math.log(pretrain.VOCABULARY)
    assert found["english-docs/validation"] < found["python-code/validation"] - 0.3


def test_model_shapes_suit_4_bit_blocks():
    model, report = AutoModelForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(size % 32 == 0 for p in model.parameters() for size in p.shape)


def test_model_takes_a_classification_head():
    model, report = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2, output_loading_info=True)
    assert set(report["missing_keys"]) == {"score.weight"}
    assert not report["unexpected_keys"]
    assert model.config.pad_token_id is not None


def test_pretraining_is_bit_identical(one_thread, tmp_path):
    for name in ("first", "second"):
        pretrain.save(*pretrain.fit(steps=3)[:2], tmp_path / name)
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("first", "second"))
    assert "model.safetensors" in first
    assert first == second


def test_lr_warms_up_and_falls():
    shares = [pretrain.lr_share(step, 1000) for step in range(1000)]
    assert max(shares) == shares[pretrain.WARMUP_STEPS] == 1
    assert shares[0] < 0.01
    assert shares[-1] == pytest.approx(pretrain.FINAL_LR_SHARE, abs=1e-3)
