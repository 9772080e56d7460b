"""The layer of several runs against the definition, y = W0 x + s B A (x ∘ mask), run by run, in float64 by autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorabench.training.packed.layer import Factors, Lanes, PackedLinear, Unpackable

SHAPES = st.fixed_dictionaries(
    {
        "ranks": st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any),
        "cut": st.integers(0, 4),
        "rows": st.integers(1, 2),
        "lengths": st.integers(1, 4),
        "inputs": st.integers(1, 5),
        "outputs": st.integers(1, 5),
        "plain": st.booleans(),
        "start": st.booleans(),
        "drops": st.booleans(),
        "first": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


class Given(nn.Linear):
    """A layer that is not known to be plain, as a quantized one."""


def group(whole: Factors, runs: slice) -> Factors:
    parts = {key: getattr(whole, key)[runs] for key in ("A", "B", "grad_A", "grad_B", "scale", "dropout")}
    start = None if whole.start is None else (whole.start[0][runs], whole.start[1][runs])
    return Factors(runs=runs, start=start, **parts)


def packed(case: dict, generators: list[torch.Generator]) -> tuple[PackedLinear, Factors]:
    """The runs are two groups; one of runs that train nothing here is not there. And their factors in one."""
    K, R = len(case["ranks"]), max(case["ranks"])
    base = (nn.Linear if case["plain"] else Given)(case["inputs"], case["outputs"]).double().requires_grad_(False)
    layer = PackedLinear(base, Lanes())
    A, B = (torch.zeros(K, R, size, dtype=torch.float64) for size in (case["inputs"], case["outputs"]))
    for row, rank in enumerate(case["ranks"]):
        A[row, :rank], B[row, :rank] = torch.randn_like(A[row, :rank]), torch.randn_like(B[row, :rank])
    start = (torch.randn(K, 2, case["inputs"]).double(), torch.randn(K, 2, case["outputs"]).double())
    whole = Factors(
        runs=slice(0, K),
        A=A, B=B, grad_A=torch.zeros_like(A), grad_B=torch.zeros_like(B), scale=torch.rand(K, 1, 1).double(),
        dropout=[(0.4 if row % 2 else 0.0) if rank and case["drops"] else None for row, rank in
                 enumerate(case["ranks"])],
        start=start if case["start"] else None,
    )  # fmt: skip
    cuts = [slice(0, case["cut"]), slice(case["cut"], K)]
    layer.groups = [group(whole, runs) for runs in cuts if any(case["ranks"][runs]) or (case["start"] and len(A[runs]))]
    lengths = [max(1, case["lengths"] - row % 2) for row in range(K)]  # one may be padded to another's
    layer.lanes.num_rows, layer.lanes.lengths, layer.lanes.generators = K * case["rows"], lengths, generators
    return layer, whole


def defined(
    layer: PackedLinear, factors: Factors, x: Tensor, A: Tensor, B: Tensor, generators: list[torch.Generator]
) -> Tensor:
    """What the layer is to compute; dropout as torch draws it for each run from its own random numbers."""
    found = []
    for row, own in enumerate(x.chunk(len(A))):
        share, length = factors.dropout[row], layer.lanes.lengths[row]
        given = own
        if share:
            torch.set_rng_state(generators[row].get_state())
            read = nn.functional.dropout(own[:, :length], share)
            given = torch.cat([read, own[:, length:]], 1)
        y = layer.base_layer(own) + factors.scale[row] * (given @ A[row].T) @ B[row]
        if factors.start is not None:
            A0, B0 = (part[row] for part in factors.start)
            y = y - (own @ A0.T) @ B0
        found.append(y)
    return torch.cat(found)


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_the_layer_computes_its_definition_and_its_gradients(case: dict) -> None:
    torch.manual_seed(case["seed"])
    ours, theirs = ([torch.Generator().manual_seed(row) for row in range(len(case["ranks"]))] for _ in range(2))
    layer, factors = packed(case, ours)
    size = (layer.lanes.num_rows, case["lengths"], case["inputs"])
    x, weight = torch.randn(size).double(), torch.randn(*size[:2], case["outputs"]).double()
    x.requires_grad_(not case["first"])  # the first layer's input is frozen
    y = layer(x)
    (y * weight).sum().backward()
    got = [y.detach(), factors.grad_A, factors.grad_B, x.grad]
    A, B = factors.A.clone().requires_grad_(), factors.B.clone().requires_grad_()
    x = x.detach().requires_grad_(not case["first"])
    expected = defined(layer, factors, x, A, B, theirs)
    (expected * weight).sum().backward()
    for one, other in zip(got, [expected.detach(), A.grad, B.grad, x.grad], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    for row, rank in enumerate(case["ranks"]):
        assert not factors.grad_A[row, rank:].any() and not factors.grad_B[row, rank:].any()
        state = torch.Generator().manual_seed(row).get_state()
        assert torch.equal(ours[row].get_state(), state) == (not factors.dropout[row])


def test_a_layer_that_is_given_other_rows_than_the_batch_s_says_so() -> None:
    case = {"ranks": [1], "cut": 0, "rows": 2, "lengths": 3, "inputs": 2, "outputs": 2, "plain": True, "start": False,
            "drops": False}  # fmt: skip
    layer, _ = packed(case, [])
    for shape in ((6, 2), (3, 3, 2)):
        with pytest.raises(Unpackable, match="not the 2 rows of the batch"):
            layer(torch.zeros(shape).double())
