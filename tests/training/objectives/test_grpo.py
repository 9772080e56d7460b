"""GRPO beside TRL's own loss, the policy gradient, hand numbers; and runs that are trained by it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.launch.plan import make_plan, refusals
from lorabench.spec.known import known_measures
from lorabench.spec.measures import MEASURES
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep, parse_sweep
from lorabench.spec.task import IGNORE
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training import rollouts
from lorabench.training.base import Base
from lorabench.training.execute import Options, execute
from lorabench.training.meter import Meter
from lorabench.training.objectives.grpo import Grpo
from lorabench.training.state import Training
from lorabench.training.step import forward_backward
from lorabench.training.stop import Stop, Stopped
from tests.conftest import make_spec
from tests.methods.test_methods import CPU, IMPOSSIBLE
from tests.training.test_ranks import learned, run

QUIET = Options(log_to_file=False, device="cpu")
GENERATE = {"max_new_tokens": 5, "answer": "(d)", "batch_size": 64, "splits": "validation"}


def words(folder) -> str:
    """Prompts of several lengths; what is wanted is a `d`, which is in a third of the built-in model's answers."""
    for split, first in {"train": 0, "validation": 30}.items():
        texts = [" ".join(["the", "value", "of", "an", "object", "is"][: n % 5 + 2]) for n in range(first, first + 20)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"q": text, "a": "d"}) + "\n" for text in texts))
    return str(folder)


def spec_of(folder, objective="grpo", **changes) -> RunSpec:
    task = {"name": "completion", "data": words(folder), "prompt": "{q}", "response": "{a}", "max_eval": 4}
    own = {"task": task | {"generate": GENERATE}, "objective": objective, "batch_size": 16, "seq_len": 16}
    return make_spec(**(own | changes))


def begun(spec: RunSpec) -> Training:
    return Training.attach(spec, Base.read(spec, CPU), Meter.of_run(spec, CPU))


def move(model, size: float) -> None:
    """So that an adapter does something, and is no longer what it was."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_advantages_of_hand_numbers_and_as_trl_has_their_deviation():
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]])
    found = Grpo(group=4).advantages(rewards)
    assert found[0].tolist() == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3])
    assert found[1].tolist() == [0, 0, 0, 0]
    assert found[2, 3] == pytest.approx(0.5 / (math.sqrt(1 / 3) + 1e-4))
    theirs = (rewards - rewards.mean(1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    torch.testing.assert_close(found, theirs)
    assert Grpo(group=4, loss="dr_grpo").advantages(rewards)[0].tolist() == [0.75, -0.25, -0.25, -0.25]


def test_the_loss_of_hand_numbers():
    """Ratios 1.5 and 0.5, and 1 where nothing is answered; advantages 2 and -1; 3 tokens and 1."""
    now = torch.tensor([1.5, 0.5, 1.0, 0.5, 1, 1]).log().view(2, 3)
    drawn, base = torch.zeros(2, 3), torch.tensor([[math.log(3.0), 0, 0], [0, 9, 9]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    gains = torch.tensor([2.0, -1.0])
    for loss, weights in {"grpo": [1 / 6, 1 / 2], "dapo": [1 / 4] * 2, "dr_grpo": [1 / 20] * 2}.items():
        objective = Grpo(loss=loss, kl=0.5)
        assert objective.weights([3, 1], 10) == pytest.approx(weights)
        found, about = objective.policy_loss(now, drawn, gains, torch.tensor(weights), mask, base)
        kl = [[2 - math.log(2) - 1, 2 - math.log(2) - 1, 0], [2 - math.log(2) - 1]]
        tokens = [[-2 * 1.2, -2 * 0.5, -2 * 1.0], [0.8]]  # the first and the last are clipped
        sums = [sum(row) for row in tokens], [sum(row) for row in kl]
        want = [sum(w * value for w, value in zip(weights, each, strict=True)) for each in sums]
        assert float(found) == pytest.approx(want[0] + 0.5 * want[1])
        assert float(about["kl"]) == pytest.approx(want[1])
        assert float(about["clipped"]) == pytest.approx(weights[0] + weights[1])


def trl_loss(training: Training, objective: Grpo) -> torch.Tensor:
    """TRL's own, on its own pass over the same answers: prompts padded on the left, answers on the right."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    samples = training.rollout
    starts = [sum(label == IGNORE for label in sample["labels"]) for sample in samples]
    ids = [torch.tensor(sample["input_ids"]) for sample in samples]
    pieces = {
        "prompt": [row[:start].flip(0) for row, start in zip(ids, starts, strict=True)],
        "completion": [row[start:] for row, start in zip(ids, starts, strict=True)],
    }
    inputs = {"advantages": torch.tensor([sample["advantage"] for sample in samples])}
    for name, rows in pieces.items():
        both = pad_sequence(rows, True), pad_sequence([torch.ones_like(row) for row in rows], True)
        inputs[f"{name}_ids"], inputs[f"{name}_mask"] = (each.flip(1) if name == "prompt" else each for each in both)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    for key, theirs in {"drawn": "old_per_token_logps", "base": "ref_per_token_logps"}.items():
        if key in samples[0]:
            rows = [torch.tensor(each[key][start - 1 : -1]) for each, start in zip(samples, starts, strict=True)]
            inputs[theirs] = pad_sequence(rows, True)
    accelerator = SimpleNamespace(
        num_processes=1,
        is_main_process=True,
        autocast=nullcontext,
        gather=lambda each: each,
        reduce=lambda each, reduction: each,
    )
    generate = training.spec.task.generation
    trainer = SimpleNamespace(
        accelerator=accelerator, model=training.model,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        beta=objective.kl, epsilon_low=objective.clip, epsilon_high=objective.clip, loss_type=objective.loss,
        importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        aux_loss_enabled=False, current_gradient_accumulation_steps=1, max_completion_length=generate.max_new_tokens,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = partial(GRPOTrainer._get_per_token_logps_and_entropies, trainer)
    add_fused_lm_head(training.model.get_base_model(), objective.temperature, outputs=("log_probs", "entropy"))
    return GRPOTrainer._compute_loss(trainer, training.model, inputs)


CASES = {
    "on-policy": {},
    "clipped": {"inner_steps": 2, "clip": 0.1, "temperature": 0.7},
    "dapo, kl": {"inner_steps": 2, "kl": 0.3, "loss": "dapo"},
    "dr_grpo": {"inner_steps": 2, "loss": "dr_grpo"},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_trl_s(case, tmp_path):
    """Also in passes of a few answers, where TRL takes all at once."""
    training = begun(spec_of(tmp_path, {"name": "grpo", "group": 4} | CASES[case], micro_batch_size=4))
    objective = training.spec.objective
    move(training.model, 0.02)
    batches = objective.batches(training, lambda: None)
    parts, work = batches.next()
    assert len({sample["reward"] for sample in training.rollout}) == 2
    told = [sample for sample in training.rollout if sample["advantage"] or objective.kl]
    assert work.labels == sum(label != IGNORE for sample in told for label in sample["labels"])
    if objective.inner_steps > 1:
        move(training.model, 0.02)
    loss = forward_backward(training, parts, batches)
    ours = gradients(training.model)
    training.optimizer.zero_grad()
    theirs = trl_loss(training, objective)
    theirs.backward()
    assert float(loss) == pytest.approx(float(theirs.detach()), abs=2e-6)
    torch.testing.assert_close(ours, gradients(training.model), rtol=1e-3, atol=2e-6 + 1e-4 * float(ours.abs().max()))
    assert (batches.about()["clipped"] > 0) == (objective.inner_steps > 1)


def test_on_policy_its_gradient_is_the_policy_gradient(tmp_path):
    """Σ w A ∇ log p of each answer alone, without any padding."""
    training = begun(spec_of(tmp_path))
    move(training.model, 0.02)
    batches = training.spec.objective.batches(training, lambda: None)
    parts, _ = batches.next()
    forward_backward(training, parts, batches)
    ours = gradients(training.model)
    training.optimizer.zero_grad()
    for sample in training.rollout:
        start, ids = sum(label == IGNORE for label in sample["labels"]), torch.tensor([sample["input_ids"]])
        logs = training.model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        answered = logs.gather(1, ids[0, start:, None]).mean()
        (-sample["advantage"] * answered / len(training.rollout)).backward()
    torch.testing.assert_close(ours, gradients(training.model), rtol=1e-3, atol=1e-4 * float(ours.abs().max()))
    assert float(ours.abs().max()) > 0


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_what_is_trained_on_is_what_each_method_s_model_wrote(name, tmp_path, tiny_bases):
    """Drawn at almost no temperature, each token is the likeliest of the pass that is trained on: padding, prompts and
    virtual tokens stand where they stood."""
    if (name, "llama") in IMPOSSIBLE:
        pytest.skip(IMPOSSIBLE[name, "llama"])
    cold = {"name": "grpo", "group": 2, "temperature": 1e-5, "inner_steps": 2}
    method = plugins.example("methods", name)
    spec = dataclasses.replace(spec_of(tmp_path, cold, model=tiny_bases["llama"], micro_batch_size=8), method=method)
    training = begun(spec)
    move(training.model, 0.05)
    batches = spec.objective.batches(training, lambda: None)
    batches.next()
    drawn = torch.tensor([value for sample in training.rollout for value in sample["drawn"]])
    assert training.model.training and float(drawn.min()) > -0.5
    lengths = [sum(label != IGNORE for label in sample["labels"]) for sample in training.rollout]
    assert set(lengths) <= set(range(1, 6)) and len({len(sample["input_ids"]) for sample in training.rollout}) > 1


def test_the_model_learns_what_is_rewarded(tmp_path):
    spec = spec_of(tmp_path, {"name": "grpo", "group": 8}, batch_size=64, steps=15, lr=1e-2, warmup=0.0)
    store = Store(tmp_path / "results")
    assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    record = store.read(spec.id)
    rows = [json.loads(line) for line in (store.folder(spec.id) / "steps.jsonl").read_text().splitlines()]
    assert rows[0]["reward"] < 0.5 < 0.7 < record.measures["train_reward"] == rows[-1]["reward"]
    assert record.measures["valid_exact_match"] >= record.measures["base_valid_exact_match"]
    assert {"reward_std", "zero_advantage_share", "answer_tokens"} <= set(rows[0])
    assert record.measures["rollout_seconds"] > 0 and set(record.measures) <= set(MEASURES)
    assert set(record.files) >= {"updates/adapter_model.safetensors"}


RUNS = {
    "dropout": {"method": {"name": "lora", "rank": 2, "dropout": 0.2}},
    "full, on the same answers": {
        "method": {"name": "full"},
        "objective": {"name": "grpo", "inner_steps": 3, "kl": 0.1},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_has_the_same_bits(name, tmp_path, monkeypatch):
    spec = spec_of(tmp_path, **({"objective": "grpo"} | RUNS[name]))
    whole, stopped = Store(tmp_path / "whole"), Store(tmp_path / "stopped")
    assert execute(spec, whole, QUIET) == Status.DONE, whole.read(spec.id).error
    for checks in (5, 3):  # while it writes, or between two steps on the same answers
        seen = iter(range(10**6))

        def check(self, seen=seen, checks=checks):
            if next(seen) == checks:
                raise Stopped("SIGTERM")

        with monkeypatch.context() as context:
            context.setattr(Stop, "check", check)
            assert execute(spec, stopped, QUIET) == Status.CANCELLED
    assert execute(spec, stopped, QUIET) == Status.DONE
    want, got = whole.read(spec.id), stopped.read(spec.id)
    assert 0 < got.resumed_from_step < spec.steps
    assert got.files == want.files and got.steps_sha256 == want.steps_sha256


def test_two_processes_that_share_the_weights_out_have_the_numbers_of_one(tmp_path):
    objective = {"name": "grpo", "inner_steps": 2, "kl": 0.1}
    spec = spec_of(tmp_path, objective, batch_size=24, micro_batch_size=8, steps=4, epsilon=1e-5)
    logs, tensors = [], []
    for processes, sharding in ((1, "auto"), (2, "fsdp")):
        root = tmp_path / str(processes)
        (record,) = run(root, processes, spec, sharding=sharding)
        assert record.status == Status.DONE, record.error
        lines = (root / "runs" / spec.id / "steps.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
        tensors.append(learned(root, record))
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
        assert (one["reward"], one["answer_tokens"]) == (two["reward"], two["answer_tokens"])
    for name, tensor in tensors[0].items():
        assert (tensors[1][name] - tensor).norm() < 1e-4 * tensor.norm()


def test_each_step_draws_anew_and_the_same_again(tmp_path):
    spec = spec_of(tmp_path)
    training = begun(spec)
    state = torch.get_rng_state()
    drawn = []
    for step in (0, 1, 0):
        training.step = step
        spec.objective.batches(training, lambda: None).next()
        drawn.append([sample["input_ids"] for sample in training.rollout])
    assert drawn[0] == drawn[2] != drawn[1] and torch.equal(torch.get_rng_state(), state)
    groups = [drawn[0][i : i + 8] for i in range(0, 16, 8)]
    assert all(len({tuple(row) for row in group}) > 1 for group in groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"name": "grpo", "group": 1}}, r"objective\.group = 1: must be at least 2"),
        ({"objective": {"name": "grpo", "group": 3}}, r"objective\.group = 3: must divide batch_size = 16"),
        ({"objective": {"name": "grpo", "temperature": 0.0}}, r"objective\.temperature = 0\.0: must be greater than 0"),
        ({"objective": {"name": "grpo", "clip": 1.0}}, r"objective\.clip = 1\.0: must be less than 1"),
        ({"objective": {"name": "grpo", "kl": -0.1}}, r"objective\.kl = -0\.1: must be at least 0"),
        ({"objective": {"name": "grpo", "loss": "ppo"}}, r"objective\.loss = .ppo.*Choices: grpo, dapo, dr_grpo"),
        ({"objective": {"name": "grpo", "groups": 4}}, r"objective\.groups = 4: unknown key.*Did you mean 'group'"),
        ({"objective": "gropo"}, r"objective\.name = .gropo.*Did you mean 'grpo'\? Choices: grpo, supervised"),
        ({"objective": 3}, r"objective\.name: is missing"),
        ({"task": {"name": "seq2seq", "generate": {"metrics": ["exact_match"]}}}, r"no answers of an encoder-decoder"),
        ({"task": {"name": "text"}}, r'objective\.name = "grpo": its reward is exact match.*use task\.name = "comple'),
        ({"task": {"name": "completion", "generate": {"metrics": ["bleu"]}}}, "its reward is exact match"),
        ({"tasks": [{"name": "text"}] * 2}, "trains on one task; use task instead of tasks"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_read(changes, message, tmp_path):
    own = {"task": spec_of(tmp_path).to_json()["task"], "objective": "grpo", "batch_size": 16} | changes
    if "tasks" in changes:
        own["task"] = changes["tasks"][0]
    with pytest.raises(InputError, match=message):
        make_spec(**own)


def test_a_training_reference_without_an_answer_is_refused_before_anything_starts(tmp_path):
    spec = spec_of(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"q": "the", "a": "d"}\n{"q": "an", "a": "o"}\n')
    (problem,) = refusals([spec])
    assert problem.startswith("train split: task.generate.answer = ") and "line 2" in problem
    assert not refusals([dataclasses.replace(spec, objective=plugins.example("objectives", "supervised"))])


def test_the_plan_says_what_it_leaves_out_and_counts_the_answers(tmp_path):
    spec = spec_of(tmp_path, {"name": "grpo", "kl": 0.1})
    same = dataclasses.replace(spec, objective=plugins.example("objectives", "supervised"))
    plan = make_plan(Sweep(name="s", text="", runs=(spec, same)), Store(tmp_path / "results"), "cpu")
    assert any("grpo trains on and the copy of the base" in line for line in plan["assumptions"])
    ours, theirs = (run["estimate"]["seconds"] for run in plan["runs"])
    assert ours > theirs


def test_specs_without_it_keep_their_ids_and_with_it_are_read_again(tmp_path):
    spec = spec_of(tmp_path, {"name": "grpo", "group": 4})
    assert RunSpec.from_json(spec.to_json()) == spec and spec.flat["objective.group"] == 4
    usual = dataclasses.replace(spec, objective=plugins.example("objectives", "supervised"))
    assert "objective" not in usual.to_json() and usual.id != spec.id
    assert "train_reward" in known_measures([spec]) and "train_reward" not in known_measures([usual])


def test_a_sweep_may_have_both(tmp_path):
    base = {key: value for key, value in spec_of(tmp_path).to_json().items() if key not in ("objective", "tasks")}
    base |= {"model": "builtin:tiny-llama"}
    grid = [{"objective": "supervised"}, {"objective": {"name": "grpo", "group": [4, 8]}}]
    sweep = parse_sweep({"name": "both", "base": base, "grid": grid})
    assert [run.objective.name for run in sweep.runs] == ["supervised", "grpo", "grpo"]


def test_rewards_are_the_task_s_exact_match(tmp_path, monkeypatch):
    training = begun(spec_of(tmp_path))
    asked: list = []
    monkeypatch.setattr(rollouts, "exact_match", lambda *given: asked.append(given) or float(len(asked) % 2))
    batches = training.spec.objective.batches(training, lambda: None)
    batches.next()
    assert len(asked) == 16 and {given[1:] for given in asked} == {("d", training.spec.task.generation)}
    assert [sample["reward"] for sample in training.rollout] == [1.0, 0.0] * 8
    about = batches.about()
    assert about["reward"] == 0.5 and about["reward_std"] == pytest.approx(math.sqrt(4 / 15))
    assert about["zero_advantage_share"] == 0
