"""A rank that no layer of its size can have is told, with the layer and both sizes."""

from pathlib import Path

import pytest

from lorabench.launch.plan import make_plan
from lorabench.models.base_model import skeleton
from lorabench.models.remarks import remarks
from lorabench.spec.sweep import parse_sweep
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute
from tests import families
from tests.conftest import TOY, make_spec

IN_VAIN = "what is more than that adds parameters, and no rank to ΔW"
FIRST = "model.layers.0.self_attn."


def told(**changes: object) -> str:
    spec = make_spec(**changes)
    return remarks(spec, skeleton(spec, {})).get("ranks", "")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "lora", "rank": 64}, ""),
        ({"name": "lora", "rank": 65},
         f"method.rank = 65: is above the smaller side of {FIRST}k_proj (64 x 128) and of 7 other layers: {IN_VAIN}"),
        ({"name": "lora", "rank": 129, "targets": "query", "layers": "1"},
         f"method.rank = 129: is above the smaller side of model.layers.1.self_attn.q_proj (128 x 128): {IN_VAIN}"),
        ({"name": "lora", "rank": 65, "rank_pattern": {"k_proj": 8, "v_proj": 100}},
         f'method.rank_pattern: "v_proj" = 100: is above the smaller side of {FIRST}v_proj (64 x 128) and of 3 other '
         f"layers: {IN_VAIN}"),
        ({"name": "adalora", "rank": 8, "start_rank": 200, "targets": "query", "layers": "0,1"},
         f"method.start_rank = 200: is above the smaller side of {FIRST}q_proj (128 x 128) and of 1 other layer: "
         f"{IN_VAIN}"),
        ({"name": "loha", "rank": 200, "targets": "query", "layers": "0"},
         f"method.rank = 200: is above the smaller side of {FIRST}q_proj (128 x 128): {IN_VAIN}"),
        ({"name": "hybrid", "lora": {"rank": 200, "targets": "query", "layers": "0"}, "adapter": {"reduction": 8}},
         f"method.lora.rank = 200: is above the smaller side of {FIRST}q_proj (128 x 128): {IN_VAIN}"),
        ({"name": "vera", "rank": 256}, ""),
        ({"name": "full"}, ""),
    ],
)  # fmt: skip
def test_a_rank_above_the_smaller_side_of_a_layer_is_told(method: dict, expected: str) -> None:
    assert told(method=method) == expected


def test_sides_are_those_of_a_transposed_layer_too(tiny_bases: dict[str, str]) -> None:
    text = told(model=tiny_bases["gpt2"], method={"name": "lora", "rank": 65, "targets": "c_attn"})
    assert "transformer.h.0.attn.c_attn (192 x 64) and of 1 other layer" in text


def test_sides_are_those_of_each_expert() -> None:
    spec = make_spec(method={"name": "lora", "rank": 1000, "targets": ".*experts.*"})
    model = families.make("mixtral")
    stack = next(p for name, p in model.named_parameters() if name.endswith("experts.gate_up_proj"))
    assert f"gate_up_proj ({stack.shape[1]} x {stack.shape[2]})" in remarks(spec, model)["ranks"]


def test_it_is_a_note_of_the_plan_and_stands_in_the_record(tmp_path: Path) -> None:
    method = {"name": "lora", "rank": 200, "targets": "query"}
    spec = make_spec(method=method, steps=1)
    text = f"method.rank = 200: is above the smaller side of {FIRST}q_proj (128 x 128) and of 3 other layers: {IN_VAIN}"
    sweep = parse_sweep({"base": TOY | {"method": method, "seed": [0, 1]}})
    assert make_plan(sweep, Store(tmp_path), "cpu")["notes"].count(f"builtin:tiny-llama: ranks: {text}") == 1
    store = Store(tmp_path)
    assert execute(spec, store, Options(device="cpu", log_to_file=False)) == "done"
    record = store.read(spec.id)
    assert record is not None and record.provenance["ranks"] == text
