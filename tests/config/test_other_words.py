"""Other tools' words lead to keys and measures that there are."""

from __future__ import annotations

import dataclasses
import re
import tomllib

import pytest

from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.config.other_words import METHODS, OPTIMIZERS, WORDS
from lorabench.spec import described
from lorabench.spec.measures import MEASURES
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import parse_sweep
from tests.conftest import TOY


def keys() -> set[str]:
    """All that a sweep file may say of a run."""
    of_plugins = {
        field.key
        for folder in ("methods", "tasks", "objectives", "optimizers")
        for name in plugins.names(folder)
        for field in described.describe(folder, name).fields
    }
    return of_plugins | {"method.name", "task.name"} | {field.name for field in dataclasses.fields(RunSpec)}


def test_every_word_leads_somewhere_and_is_no_key_itself() -> None:
    known = keys() | MEASURES.keys()
    assert {re.split(": | = ", text)[0] for text in WORDS.values()} <= known
    assert not WORDS.keys() & known
    methods = plugins.names("methods")
    assert {text.partition(":")[0] for text in METHODS.values()} <= {*methods} and not METHODS.keys() & {*methods}


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"learning_rate": 1e-3}, "unknown key 'learning_rate'. Did you mean 'lr'?"),
        ({"lora_r": 8}, "Did you mean 'method.rank'?"),
        ({"method": {"name": "lora", "r": 8}}, "method.r = 8: unknown key 'r'. Did you mean 'method.rank'?"),
        ({"num_train_epochs": 3}, "Did you mean 'steps'? The length of a run is told in steps, not in epochs."),
        ({"load_in_4bit": True}, "Did you mean 'quantization = \"nf4\"'?"),
        ({"task": TOY["task"] | {"max_seq_length": 8}}, "Did you mean 'seq_len'?"),
    ],
)
def test_a_key_of_another_tool_is_known(base: dict, said: str) -> None:
    with pytest.raises(InputError) as error:
        parse_sweep({"base": TOY | {"method": {"name": "lora"}} | base})
    assert len(error.value.problems) == 1 and said in error.value.problems[0]


@pytest.mark.parametrize(("name", "text"), METHODS.items())
def test_what_elsewhere_is_a_method_is_known(name: str, text: str) -> None:
    with pytest.raises(InputError) as error:
        parse_sweep({"base": TOY | {"method": {"name": name}}})
    method, _, field = text.partition(": with ")
    assert f"Did you mean '{method}'?{f' With {field}.' if field else ''}" in str(error.value)
    if field:  # which the method has, with such a value
        on = {"quantization": "nf4"} if name == "loftq" else {}
        parse_sweep({"base": TOY | {"method": {"name": method}} | on, "grid": [tomllib.loads(field)]})


@pytest.mark.parametrize(("name", "text"), OPTIMIZERS.items())
def test_an_optimizer_of_torch_or_transformers_is_known(name: str, text: str) -> None:
    with pytest.raises(InputError) as error:
        parse_sweep({"base": TOY | {"method": {"name": "lora"}, "optimizer": name}})
    own, _, field = text.partition(": with ")
    assert f"Did you mean '{own}'?{f' With {field}.' if field else ''}" in str(error.value)
    optimizer = tomllib.loads(field)["optimizer"] if field else {}
    parse_sweep({"base": TOY | {"method": {"name": "lora"}, "optimizer": {"name": own} | optimizer}})


def test_a_measure_of_another_tool_is_known() -> None:
    drawn = {
        "select": {"over": "lr", "by": "val_loss"},
        "table": [{"rows": ["method.name"], "value": "eval_accuracy"}, {"rows": ["lora_r"], "value": "valid_loss"}],
        "claim": [{"says": "few", "measure": "trainable_params", "at_most": 1}],
    }
    with pytest.raises(InputError) as error:
        parse_sweep({"base": TOY | {"method": {"name": "lora"}}} | drawn)
    text = str(error.value)
    for name in ("valid_loss", "valid_accuracy", "method.rank", "num_trainable"):
        assert f"Did you mean '{name}'?" in text
    assert len(error.value.problems) == 4
