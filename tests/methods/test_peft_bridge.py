"""The bridge to PEFT's other tuners: checked when a sweep is read, and ΔW right whatever the tuner."""

from __future__ import annotations

import pytest
import torch

from lorabench.config.decode import InputError
from lorabench.training.passes import forward
from lorabench.updates.formats import read_updates
from tests.conftest import make_spec
from tests.methods.test_methods import MATRICES, add, load_base, method_spec, tuned

TUNERS = {
    "FOURIERFT": {"n_frequency": 50},
    "RANDLORA": {"r": 4},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "MISS": {"r": 2},
    "HIRA": {"r": 2},
    "DELORA": {"r": 2},
    "OSF": {"effective_rank": 32},
    "CPT": {"num_virtual_tokens": 4, "cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1, 1, 1, 1],
            "cpt_tokens_type_mask": [1, 2, 3, 4]},
}  # fmt: skip


@pytest.mark.parametrize("kind", TUNERS)
def test_the_tuner_trains_saves_loads_and_its_update_is_what_it_computes(kind, tiny_bases, labelled, tmp_path):
    method = {"type": kind, "config": TUNERS[kind]}
    spec = method_spec("peft", "llama", tiny_bases, labelled, method, lr=1e-2)
    model, batch, losses, examples = tuned(spec)
    assert losses[-1] < losses[0]
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    with torch.no_grad():
        want = forward(model, batch)
        loaded = spec.method.load(load_base(spec, examples), tmp_path, spec).eval()
        torch.testing.assert_close(forward(loaded, batch), want, atol=2e-5, rtol=1e-4)
        if spec.method.has_update:
            got = forward(add(load_base(spec, examples), read_updates(tmp_path)), batch)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)  # ΔW is a difference of float32 outputs
        else:
            assert kind == "CPT"
            assert not (tmp_path / "delta.safetensors").exists() or not list(read_updates(tmp_path))


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ({"type": "FOURIERF"}, "unknown PEFT type 'FOURIERF'. Did you mean 'FOURIERFT'?"),
        ({"type": "HRA", "config": {"rank": 3}}, "method.config.rank: unknown field 'rank'"),
        ({"type": "HRA", "config": {"target_modules": ["q"]}}, "method.config.target_modules: unknown field"),
        ({"type": "FOURIERFT", "config": {"target_parameters": 1}}, "method.config.target_parameters"),
        ({"type": "BOFT", "config": {"boft_block_size": 4, "boft_block_num": 4}}, "BOFTConfig refuses it"),
        ({"type": 3}, "method.type = 3"),
        ({"type": "LN_TUNING"}, 'use method.name = "layernorm"'),
    ],
)
def test_bad_input_is_refused_when_the_sweep_is_read(method, problem):
    with pytest.raises(InputError) as error:
        make_spec(method={"name": "peft"} | method)
    assert problem in str(error.value)


def test_a_tuner_that_fails_on_quantized_weights_is_refused():
    with pytest.raises(InputError, match=r'quantization = "nf4": not known to work with method\.type = "HRA"'):
        make_spec(method={"name": "peft", "type": "HRA"}, quantization="nf4")


def test_a_size_that_does_not_fit_the_model_is_refused_by_the_plan(tiny_bases):
    from lorabench.launch.plan import count

    spec = make_spec(method={"name": "peft", "type": "C3A", "config": {"block_size": 48}}, model=tiny_bases["llama"])
    with pytest.raises(InputError, match=r'method\.type = "C3A": PEFT refuses it'):
        count(spec)


def test_a_tuner_that_computes_on_weights_is_counted_on_random_ones(tiny_bases):
    from lorabench.launch.plan import count

    method = {"name": "peft", "type": "BOFT", "config": {"boft_block_size": 4}}
    blocks = sum(n // 4 * 16 + m for m, n in MATRICES)  # N / b blocks of b², and a scale for each output
    assert count(make_spec(method=method, model=tiny_bases["llama"])).num_trainable == blocks
