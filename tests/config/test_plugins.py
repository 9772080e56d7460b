"""The registries: every file of a folder is a plug-in that works without being named anywhere else."""

import dataclasses
import subprocess
import sys

import pytest

from lorabench.config import plugins
from lorabench.config.decode import decode_plugin, encode
from lorabench.spec.analysis import Analysis
from lorabench.spec.figure import Figure
from lorabench.spec.method import Method
from lorabench.spec.objective import Objective
from lorabench.spec.optimizer import Optimizer
from lorabench.spec.task import Task

BASES = {"methods": Method, "tasks": Task, "objectives": Objective, "optimizers": Optimizer, "analyses": Analysis,
         "figures": Figure}  # fmt: skip
ALL = [(folder, name) for folder in plugins.FOLDERS for name in plugins.names(folder)]


@pytest.mark.parametrize(("folder", "name"), ALL)
def test_every_file_is_a_documented_dataclass_with_an_example(folder: str, name: str) -> None:
    example = plugins.example(folder, name)
    assert isinstance(example, BASES[folder])
    assert (example.name, example.folder) == (name, folder)
    assert dataclasses.is_dataclass(example) and type(example).__dataclass_params__.frozen
    text = plugins.describe(folder)[name]
    assert text == sys.modules[type(example).__module__].__doc__.partition("\n")[0] and text.endswith(".")


@pytest.mark.parametrize(("folder", "name"), ALL)
def test_every_plugin_can_stand_in_a_sweep_file(folder: str, name: str) -> None:
    example = plugins.example(folder, name)
    assert decode_plugin(BASES[folder], encode(example), "x") == example


@pytest.mark.parametrize(("folder", "name"), [item for item in ALL if item[0] not in ("tasks", "analyses")])
def test_methods_objectives_optimizers_and_figures_have_a_default_for_every_field(folder: str, name: str) -> None:
    assert decode_plugin(BASES[folder], {"name": name}, "x").name == name


@pytest.mark.parametrize("folder", plugins.FOLDERS)
def test_an_unknown_name_gets_the_choices_and_the_closest(folder: str) -> None:
    names = plugins.names(folder)
    with pytest.raises(KeyError) as error:
        plugins.example(folder, names[0] + "x")
    assert f"Did you mean '{names[0]}'?" in str(error.value.args[0])
    assert all(name in error.value.args[0] for name in names)


def test_of_many_choices_the_nearest_are_listed_and_the_others_counted() -> None:
    choices = [f"measure_{number}" for number in range(200)] + ["valid_loss", "valid_token_accuracy"]
    text = plugins.unknown("measure", "valid_los", choices)
    assert "Did you mean 'valid_loss'? Choices: valid_loss, valid_token_accuracy, " in text
    assert text.endswith(", … and 182 more") and len(text) < 500


def test_plugins_are_imported_without_torch_or_pandas() -> None:
    program = f"""
import sys
from lorabench.config import plugins
for folder, name in {ALL!r}:
    plugins.example(folder, name)
print(sorted({{"torch", "pandas", "transformers", "matplotlib", "peft"}} & set(sys.modules)))
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"
