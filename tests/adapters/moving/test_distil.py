"""Trans-LoRA: what is kept and learned, against transformers' and PEFT's own models; taken up again; refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorabench.adapters.compression.compressible import open_subject
from lorabench.adapters.moving.distil import Distiller
from lorabench.adapters.moving.kept_moves import moves_folder
from lorabench.adapters.moving.move import ByData, move_adapter
from lorabench.adapters.moving.prompts import Made, as_question, asks, made_prompt
from lorabench.adapters.moving.transfer import Transfer
from lorabench.adapters.moving.transfer_text import transfer_text
from lorabench.cli import main
from lorabench.models.base_model import load_tokenizer, local_files
from lorabench.spec.move import Distillation
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.evaluation import metrics_of
from lorabench.training.examples import prepare
from lorabench.training.execute import Options, execute
from tests.conftest import make_spec

SUMS = {"name": "completion", "data": "builtin:arithmetic", "max_train": 40, "max_eval": 8}
HOW = Distillation(prompts=16, examples=20, generator_steps=20, steps=8)


@pytest.fixture(scope="module")
def study(tiny_bases, tmp_path_factory):
    """A run, what its move to a base of another architecture gave, and what was said meanwhile."""
    root = tmp_path_factory.mktemp("distil")
    lora = {"name": "lora", "rank": 8, "targets": "all-linear"}
    spec = make_spec(
        model="builtin:tiny-llama", method=lora, task=SUMS, seq_len=48, batch_size=4, steps=24, lr=6e-3, threads=1
    )
    store = Store(root / "results")
    assert execute(spec, store, Options(log_to_file=False, device="cpu")) == Status.DONE
    said: list[str] = []
    found, folder = moved(store, spec.id, tiny_bases["gpt2"], root / "out", said)
    return store, spec, found, folder, said, root


def moved(store: Store, run_id: str, to: str, output: Path, said: list[str]):
    transfer = Transfer(open_subject(store, run_id), to, None, "trans-lora", 320)
    folder = moves_folder(store, transfer, HOW)
    return move_adapter(transfer, output, None, "cpu", said.append, ByData(how=HOW, folder=folder)), folder


def tuned(base: str, adapter: Path):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(local_files(base)), adapter).eval()


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_discriminator_keeps_what_it_takes_for_the_tasks(study, tiny_bases) -> None:
    """By the likelihoods of both words in PEFT's own model; its accuracy by those of what was held out."""
    store, spec, found, folder, _, _ = study
    told, base = found["distilled"], "builtin:tiny-llama"
    model = tuned(base, folder / "runs" / told["discriminator"] / "updates")
    tokenizer = load_tokenizer(base)

    @torch.no_grad()
    def is_real(question: str) -> bool:
        nats = []
        for word in (" yes", " no"):
            start, whole = (tokenizer(text)["input_ids"] for text in (question, question + word))
            predicted = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            nats.append(sum(float(predicted[i - 1, whole[i]]) for i in range(len(start), len(whole))))
        return nats[0] > nats[1]

    kept = [row["prompt"] for row in rows(folder / "prompts" / "train.jsonl")]
    assert len(kept) == len(set(kept)) == told["prompts_kept"] <= HOW.prompts
    assert all(is_real(as_question(prompt, "arithmetic")) for prompt in kept)
    made = [row["question"].split("\n")[0] for row in rows(folder / "discriminator" / "train.jsonl") if row["answer"]]
    transfer = Transfer(open_subject(store, spec.id), tiny_bases["gpt2"], None, "trans-lora", 320)
    distiller = Distiller(transfer=transfer, how=HOW, folder=folder, device=torch.device("cpu"), note=print)
    texts = [*made, *kept]
    taken = distiller.taken(distiller.loaded_discriminator(told["discriminator"]), texts)
    assert taken == [is_real(as_question(text, "arithmetic")) for text in texts] and set(taken) == {True, False}
    held = rows(folder / "discriminator" / "validation.jsonl")
    right = [is_real(row["question"]) == (row["answer"] == 0) for row in held]
    assert told["discriminator_accuracy"] == pytest.approx(sum(right) / len(held))
    real = {row["prompt"] for row in rows_of_task()}
    train = held + rows(folder / "discriminator" / "train.jsonl")
    assert {row["answer"] for row in train if row["question"].split("\n")[0] + "\n" in real} == {0}
    assert sum(row["answer"] for row in train) == len(train) // 2 == HOW.prompts
    low, high = told["discriminator_interval"]
    assert low <= told["discriminator_accuracy"] <= high


def rows_of_task() -> list[dict]:
    from lorabench.data.dataset import read_data

    return read_data("builtin:arithmetic").splits["train"][: SUMS["max_train"]]


def test_the_new_adapter_learns_the_old_ones_answers(study, tiny_bases) -> None:
    """As transformers generates them; its loss on the new base is that of PEFT's model."""
    store, spec, found, folder, _, root = study
    teacher, tokenizer = tuned(spec.model, store.folder(spec.id) / "updates"), load_tokenizer(spec.model)
    for row in rows(folder / "prompts" / "train.jsonl")[:3]:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        written = teacher.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        assert tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True) == row["response"]
    losses = {row["evaluated"]: row["loss"] for row in found["losses"]}
    loss = metrics_of(tuned(tiny_bases["gpt2"], root / "out"), spec, prepare(spec), "validation")["valid_loss"]
    assert losses["moved"] == pytest.approx(loss, rel=1e-5) and losses["moved"] < losses["new base"]
    assert "copied" not in losses and found["layers"] == [] and found["distilled"]["steps"] == HOW.steps
    text = transfer_text(found)
    assert "prompts made" in text and "overlap" not in text


def test_what_is_made_is_taken_up_again(study, tiny_bases) -> None:
    store, spec, found, folder, said, root = study
    assert [line for line in said if line.startswith("train")] == [
        "train a generator of prompts (source): 20 steps",
        "train the discriminator: 24 steps",
        "train the new adapter: 8 steps",
    ]
    again: list[str] = []
    other, same = moved(store, spec.id, tiny_bases["gpt2"], root / "again", again)
    assert same == folder and not any(line.startswith("train") for line in again)
    assert other["losses"] == found["losses"] and other["distilled"] == found["distilled"]
    files = [root / name / "adapter_model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_list_is_that_of_the_papers_figure_7() -> None:
    examples = ["True and False or ( not True ) is", "not not True and not False or True is"]
    printed = f"Here are 10 examples:\n\n1. {examples[0]}\n2. {examples[1]}\n3."
    assert asks(examples) == printed
    assert as_question("not True is\n", "booleans") == "not True is\nIs the above question from the booleans dataset?"


class Characters:
    """A tokenizer of characters; 0 ends a sequence."""

    eos_token_id = 0

    def decode(self, row: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, row))


@pytest.mark.parametrize(
    ("written", "examples", "prompt"),
    [
        (" 12+34\n7. 5", ["1+1\n", "2+2\n"], "12+34\n"),
        (" 12+34", ["1+1\n", "2+2\n"], None),  # cut off: no end
        (" 12+34\0\0", ["1+1", "2+2\n"], "12+34"),
        ("\n4. 12", ["1+1", "2+2"], None),  # nothing before the end
        (" a\nb\n4. c", ["x\ny", "z"], "a\nb"),  # prompts of several lines end at the next number
        (" a\nb\n5. c", ["x\ny", "z"], None),
    ],
)
def test_what_of_a_text_is_a_prompt(written: str, examples: list[str], prompt: str | None) -> None:
    row = [ord(character) for character in written]
    assert made_prompt(Characters(), row, asks(examples), examples) == prompt


def test_prompts_are_a_set() -> None:
    made = Made()
    for text in ("a", None, "b", "a"):
        made.add(text)
    assert (made.texts, made.count, made.endless, made.repeated) == (["a", "b"], 4, 1, 1)


def test_what_is_refused(study, tiny_bases, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, spec, *_ = study
    changes = ({}, {"task": SUMS}, {"task": SUMS, "method": {"name": "lora", "dora": True}})
    text, short, dora = (make_spec(model=tiny_bases["llama"], steps=1, **more) for more in changes)
    for each in (text, short, dora):
        assert execute(each, store, Options(log_to_file=False, device="cpu")) == Status.DONE
    data, to = ["--by", "trans-lora"], ["--to", tiny_bases["gpt2"], "-o", str(tmp_path / "out")]
    cases = {
        "makes prompts to answer, as task completion has them": [text.id, *data],
        "ΔW is no product of two factors": [dora.id, *data],
        "--set prompts: is of --by trans-lora alone": [spec.id, "--set", "prompts=3"],
        "--set prompt = 3: unknown key": [spec.id, *data, "--set", "prompt=3"],
        "--set prompts = 1": [spec.id, *data, "--set", "prompts=1"],
        "distil.examples = 40: the task has 40 prompts": [spec.id, *data, "--set", "examples=40"],
        "more than the 128 that": [short.id, *data, "--set", "examples=30", "--set", "prompts=3"],
    }
    for message, given in cases.items():
        assert main(["transfer", *given, *to, "--results", str(store.root), "--device", "cpu"]) == 2, message
        said = capsys.readouterr()
        assert message in said.err and "Traceback" not in said.err, said.err
        assert not (tmp_path / "out").exists()
