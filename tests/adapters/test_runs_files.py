"""A run's files are held against the digests of its record before a command shows anything of them."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

import lorabench
from lorabench.cli import main
from lorabench.config.decode import InputError
from lorabench.config.digests import file_digests
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from tests.adapter_files import save_lora
from tests.conftest import make_spec

FILE, CONFIG = "updates/adapter_model.safetensors", "updates/adapter_config.json"


def scale(file):
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)


def edit(file):
    file.write_text(file.read_text().replace('"lora_alpha": 10.0', '"lora_alpha": 20.0'))


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


DAMAGE = {
    "another size": (lambda run: scale(run / FILE), f"{FILE}: has changed since it was written"),
    "another scale": (lambda run: edit(run / CONFIG), f"{CONFIG}: has changed since it was written"),
    "cut short": (lambda run: cut(run / FILE), f"{FILE}: has changed since it was written"),
    "gone": (lambda run: (run / FILE).unlink(), f"{FILE}: is gone"),
    "all gone": (lambda run: shutil.rmtree(run / "updates"), "updates/"),
    "one more": (
        lambda run: (run / "updates" / "delta.safetensors").write_bytes(b""),
        "is no file of the run's record",
    ),
    "its record": (lambda run: (run / "record.json").write_text("{"), "record.json"),
}


@pytest.fixture
def run(tmp_path):
    """The folder of a run that is done, with an adapter and one snapshot of it."""
    spec, store = make_spec(), Store(tmp_path / "results")
    folder = store.folder(spec.id)
    save_lora(folder / "updates")
    save_lora(folder / "snapshots" / "000003", seed=1)
    files = file_digests(folder / "updates", folder) | file_digests(folder / "snapshots", folder)
    store.write_spec(spec)
    store.write(RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.DONE, files=files))
    return folder


def commands(run, tmp_path):
    save_lora(tmp_path / "other", seed=2)
    other, output, results = str(tmp_path / "other"), str(tmp_path / "output"), ["--results", str(tmp_path / "mine")]
    for given in map(str, (run, run / "updates", run / FILE)):
        yield ["inspect", given, "--json"]
        yield ["compare", other, given, "--json"]
        yield ["convert", given, output]
        yield ["compress", given, *results]


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_told_and_not_shown(case, run, tmp_path, capsys):
    change, message = DAMAGE[case]
    change(run)
    for command in commands(run, tmp_path):
        assert main(command) == 2, command
        output = capsys.readouterr()
        told = [line for line in output.err.splitlines() if "error" in line]
        assert output.out == "" and len(told) == 1 and "Traceback" not in output.err, output.err
        if (run / FILE).exists() or str(run) in command:  # else there is no such path
            assert message in told[0] and "--retry corrupt" in told[0], told
    with pytest.raises(InputError, match="retry corrupt"):
        lorabench.load(run)
    assert not (tmp_path / "output").exists()


def test_a_whole_run_is_read_and_its_other_files_are_not(run, tmp_path, capsys):
    shutil.rmtree(run / "snapshots" / "000003")
    (run / "updates" / "README.md").write_text("mine\n")
    for command in list(commands(run, tmp_path))[:3]:
        assert main(command) == 0, capsys.readouterr().err


def test_a_snapshot_is_held_against_its_own_digests(run, capsys):
    snapshot = run / "snapshots" / "000003"
    cut(run / FILE)
    assert main(["inspect", str(snapshot), "--json"]) == 0
    scale(snapshot / "adapter_model.safetensors")
    assert main(["inspect", str(snapshot), "--json"]) == 2
    assert "snapshots/000003/adapter_model.safetensors: has changed since" in capsys.readouterr().err


def test_a_run_that_has_not_ended_is_read_as_it_is(run):
    (run / "record.json").unlink()
    scale(run / FILE)
    assert main(["inspect", str(run), "--json"]) == 0
