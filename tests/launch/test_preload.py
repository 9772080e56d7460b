"""What the fork server imports, as quickly as it can be had, is what it would be otherwise."""

from __future__ import annotations

import gc

import torch

from lorabench.launch import preload


def test_functions_are_compiled_when_they_are_first_called(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    now = torch.compile
    with preload._compiled_when_called():
        plain = torch.compile(lambda a, b=1: a + b)
        chosen = torch.compile(dynamic=False)(lambda a: -a)
    assert torch.compile is now and compiled == []
    assert [plain(2), plain(2, b=3), chosen(5), chosen(6)] == [3, 5, -5, -6]
    assert compiled == [{}, {"dynamic": False}]


def test_garbage_is_collected_again_after_the_imports():
    with preload._uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
