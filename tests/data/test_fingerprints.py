"""Data that were changed under their name are told of before a run and under each table."""

from __future__ import annotations

from lorabench.data.fingerprints import changed, named
from lorabench.tasks.classification import Classification
from lorabench.tasks.text import Text


def test_data_are_called_by_their_source_and_by_what_chooses_their_rows():
    task, retained = Classification(data="films", label="mood"), Text(data="code", retain="docs")
    assert named([task], {"task": "a"}) == {"films, mood": "a"}
    assert named([retained], {"task": "a", "retain": "b"}) == {"code": "a", "docs": "b"}
    assert named([task, retained], {"task 1": "a", "task 2": "b"}) == {"films, mood": "a", "code": "b"}
    assert named([task], {}) == {}  # a record of long ago


def test_a_change_under_one_name_is_told_with_the_runs():
    same = [("run-1", {"films": "a"}), ("run-2", {"films": "a", "code": "b"})]
    assert changed(same) == []
    (sentence,) = changed([*same, ("run-3", {"films": "c"}), *((f"run-{n}", {"films": "c"}) for n in range(4, 9))])
    assert "The data films are not the same" in sentence
    assert "one content in run-1, run-2; another in run-3, run-4, run-5 and 3 more" in sentence
