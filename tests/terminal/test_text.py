"""What reaches a terminal: nothing that controls it, whatever stands in a record, a label or a file's name."""

import ast
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.cli import main
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from lorabench.terminal.text import Display, one_line, text_table, visible
from tests.conftest import make_spec

PACKAGE = Path(__file__).parents[2] / "lorabench"
HOSTILE = "\x1b]0;title\x07\x1b[2Jgone\x9b31m\r\u202eback\u2028 and \x00"


def controls(text: str) -> list[str]:
    """What a terminal could take for more than letters, ends of lines apart."""
    return [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")] + [
        c for c in text if c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    ]


@given(st.text(st.characters(exclude_characters="\t\n")))
def test_nothing_controls_the_terminal(text):
    assert not controls(visible(text)) and not controls(one_line(text))
    assert json.loads(visible(json.dumps(text, ensure_ascii=False))) == text


def test_words_stay_as_they_are():
    text = "‖ΔW‖ 中文 🙂 \033[1mhead\033[0m\ttab\nline"
    assert visible(text) == text


@pytest.fixture
def store(tmp_path):
    spec = make_spec()
    store = Store(tmp_path)
    store.write_spec(spec)
    store.write(RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.FAILED, error=HOSTILE))
    (store.folder(spec.id) / "log.txt").write_text(f"10%\r20%\r\n{HOSTILE}\n")
    return store


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_status_of_a_run_with_a_hostile_message(store, capsys, options):
    main(["status", str(store.root), *options])
    out = capsys.readouterr().out
    assert "gone" in out and not controls(out)


def test_a_log_and_an_error(store, capsys):
    main(["logs", store.run_ids()[0], "--results", str(store.root)])
    out = capsys.readouterr().out
    assert out.startswith("10%\n20%\n") and "gone" in out and not controls(out)
    assert main(["analyze", str(store.root), HOSTILE.replace("\0", "")]) == 2
    assert not controls(capsys.readouterr().err)


def test_progress_and_tables(capsys):
    with Display("a", {"run": HOSTILE}) as display:
        display.say(HOSTILE)
    assert not controls(capsys.readouterr().err)
    assert not controls(text_table([{"label": HOSTILE}], ["label"]))


TALKING = [*sorted((PACKAGE / "commands").glob("*.py")), PACKAGE / "status" / "watch.py"]


@pytest.mark.parametrize("file", TALKING, ids=str)
def test_commands_print_by_way_of_the_terminal(file):
    calls = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
