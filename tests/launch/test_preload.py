"""What the fork server imports, as quickly as it can be had, is what it would be otherwise."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import scipy.optimize
import torch

from lorabench.launch import preload
from lorabench.launch.worker import ALONE_VARIABLE

DEFERRED = """
import sys
import lorabench.launch.preload
import torch

def triple(x):
    return 3 * x

def is_there():
    return any(name.startswith("torch._dynamo.") and "convert_frame" in name for name in sys.modules)

disabled = torch.compiler.disable(triple)
later = torch.compiler.disable(recursive=False)(triple)
constant = torch.compiler.assume_constant_result(triple)
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([weight])
disabled(weight).sum().backward()
optimizer.step()
rules = torch._dynamo.trace_rules
with torch._subclasses.FakeTensorMode():
    assert torch.ones(2, 3).sum(0).shape == (3,)
settings = torch._dynamo.config
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
assert [disabled(2), later(2), constant(2)] == [6, 6, 6] and not is_there(), "imported too early"
traced = torch.compile(lambda x: disabled(x) + 1, backend="eager")
assert traced(torch.ones(1)).item() == 4 and is_there()
assert torch._dynamo.__spec__.name == "torch._dynamo" and triple._dynamo_marked_constant
assert rules.check is torch._dynamo.trace_rules.check and torch._dynamo.trace_rules.__spec__ is not None
assert torch._dynamo.config is settings and sys.modules["torch._dynamo.config"] is settings
rules.clear_lru_cache()
try:
    torch.compile(lambda x: disabled(x) + 1, backend="eager", fullgraph=True)(torch.ones(1))
except torch._dynamo.exc.Unsupported:
    print("not traced")
"""


def test_the_compiler_is_imported_when_something_is_compiled():
    """What was marked before is as if it had been there from the start."""
    found = subprocess.run([sys.executable, "-c", DEFERRED], capture_output=True, text=True)
    assert found.stdout == "not traced\n", found.stderr


def test_a_process_that_is_alone_imports_nothing_of_sharded_tensors():
    program = "import lorabench.launch.preload, os, sys, torch; print(*sys.modules, *os.environ)"
    found = {}
    for alone in (False, True):
        environment = os.environ | ({ALONE_VARIABLE: "1"} if alone else {})
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found[alone] = set(done.stdout.split())
    assert "torch.distributed.tensor" in found[False] - found[True]
    assert ALONE_VARIABLE not in found[True]


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


def test_a_function_is_imported_when_it_is_first_called(monkeypatch):
    costs = [[4, 1, 3], [2, 0, 5], [3, 2, 2]]
    want = scipy.optimize.linear_sum_assignment(costs)
    monkeypatch.delitem(sys.modules, "scipy.optimize")
    with preload._imported_when_called("scipy.optimize", "linear_sum_assignment"):
        from scipy.optimize import linear_sum_assignment
    assert "scipy.optimize" not in sys.modules
    assert [*map(list, linear_sum_assignment(costs))] == [*map(list, want)]
    assert "scipy.optimize" in sys.modules
    with preload._imported_when_called("scipy.optimize", "linear_sum_assignment"):
        assert "minimize" in vars(sys.modules["scipy.optimize"])  # where it is there already, it stays


def test_garbage_is_collected_again_after_the_imports():
    with preload._uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
