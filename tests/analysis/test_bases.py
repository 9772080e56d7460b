"""W0 as runs had it: against the models that transformers and bitsandbytes load, and the SVD cache."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabench.analysis import bases
from lorabench.analysis.bases import Base, BaseKey, cached, digest
from lorabench.config.decode import InputError
from lorabench.models import base_model, denoisers
from lorabench.models.weights import dequantized
from lorabench.updates.base import KEEP, decompose
from tests import families
from tests.conftest import make_spec


def key(model, dtype="float32", quantization="none"):
    return BaseKey(
        model=model, revision=None, dtype=dtype, quantization=quantization, auto_class="AutoModelForCausalLM"
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("quantization", "dtype"), [("none", "float32"), ("none", "bfloat16"), ("nf4", "float32"),
                                                     ("nf4", "bfloat16"), ("int8", "float32")])  # fmt: skip
def test_weights_are_those_of_the_loaded_model(tiny_bases, tmp_path, name, quantization, dtype):
    spec = make_spec(model=tiny_bases[name], quantization=quantization, dtype=dtype)
    loaded = base_model.load_base(spec, torch.device("cpu"), {})
    base = Base(key(spec.model, dtype=dtype, quantization=quantization), tmp_path)
    compared = 0
    for layer, module in loaded.named_modules():
        if not hasattr(module, "weight") or (module.weight.ndim < 2 and quantization == "none"):
            continue
        found = base.weight(f"{layer}.weight")
        if found is None or found.shape[1] < 2:
            continue
        wanted = dequantized(module).float()
        if wanted.shape != found.shape:  # Conv1D and embeddings
            wanted = wanted.mT
        assert torch.equal(found, wanted) or (found.shape[0] == found.shape[1] and torch.equal(found, wanted.mT)), layer
        compared += 1
    assert compared > 8


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_weights_of_a_quantized_denoiser_are_those_that_it_computes_with(tmp_path, quantization):
    source = "builtin:tiny-diffusion"
    spec = make_spec(task={"name": "denoising", "condition": "label"}, model=source, quantization=quantization)
    loaded = base_model.load_base(spec, torch.device("cpu"), {})
    denoiser_key = BaseKey(
        model=source, revision=None, dtype="float32", quantization=quantization, auto_class=denoisers.AUTO_CLASS
    )
    base, compared = Base(denoiser_key, tmp_path), 0
    for layer, module in loaded.named_modules():
        if type(module).__name__.startswith("Linear"):
            assert torch.equal(base.weight(f"{layer}.weight"), dequantized(module).float()), layer
            compared += 1
    assert compared > 8


@pytest.mark.parametrize("family", ["vit", "dinov2", "swin", "convnext"])
def test_weights_of_images_models_are_found_by_what_files_call_them(family, tmp_path):
    """And convolutions are (out, in · height · width)."""
    torch.manual_seed(0)
    model = families.make(family, "cpu")
    model.save_pretrained(tmp_path)
    image_key = BaseKey(
        model=str(tmp_path), revision=None, dtype="float32", quantization="none", auto_class=bases.IMAGES
    )
    base = Base(image_key, tmp_path / "cache")
    layers = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.endswith("relative_position_bias_table"):
            continue
        wanted = parameter[0] if parameter.ndim == 3 else parameter.flatten(1)
        assert torch.equal(base.weight(name), wanted.detach()), name
        layers += name.endswith(("fc1.weight", "pwconv1.weight"))
    assert layers == 2


@pytest.mark.parametrize("name", ["builtin:tiny-llama", "gpt2"])
def test_a_tied_head_has_the_embedding_below_it(tiny_bases, tmp_path, name):
    spec = make_spec(model=tiny_bases.get(name, name))
    loaded = base_model.load_base(spec, torch.device("cpu"), {})
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    found = Base(key(spec.model), tmp_path).layer("lm_head.weight")
    assert torch.equal(found.weight, loaded.lm_head.weight.detach())
    exact = torch.linalg.svdvals(loaded.lm_head.weight.detach().double())
    assert torch.allclose(found.svd.S.double(), exact, rtol=1e-5)


def test_a_new_head_is_not_in_the_files(tiny_bases, tmp_path):
    base = Base(key(tiny_bases["bert"]), tmp_path)
    assert base.weight("classifier.weight") is None and base.layer("classifier.weight") is None


def test_a_model_that_is_not_on_this_machine(tmp_path):
    with pytest.raises(InputError, match='model = "some/model": its files are not on this machine'):
        Base(key("some/model"), tmp_path)


def weight(M=40, N=30, seed=0):
    return torch.randn(M, N, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [40, KEEP + 60])
def test_the_cache_gives_what_was_decomposed(tmp_path, monkeypatch, size):
    W = weight(size, size - 10)
    first = cached(W, tmp_path)
    monkeypatch.setattr(bases, "decompose", None)
    second = cached(W, tmp_path)
    for name in ("U", "S", "Vh"):
        assert torch.equal(getattr(first.svd, name), getattr(second.svd, name))
    assert torch.equal(first.left, second.left)
    exact = np.linalg.svd(W.double().numpy(), full_matrices=False)
    assert second.svd.S.numpy() == pytest.approx(exact[1], rel=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == [f"{digest(W)}.safetensors"]


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:100]), lambda file: save_file(
    load_file(file) | {"U": torch.full((2, 2), float("nan"))}, file)])  # fmt: skip
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    W = weight()
    first = cached(W, tmp_path)
    damage(tmp_path / f"{digest(W)}.safetensors")
    assert torch.equal(cached(W, tmp_path).svd.U, first.svd.U)


def test_other_content_is_another_entry():
    W = weight()
    assert digest(W) == digest(W.clone()) == digest(W.mT.contiguous().mT)
    assert len({digest(W), digest(W + 1e-7), digest(W.reshape(30, 40))}) == 3


def test_cosines_are_over_all_left_vectors():
    """A direction that is one of W0's last left vectors: the largest cosine is 1 though the top ones say nothing."""
    W = weight(KEEP + 80, KEEP + 60)
    base = decompose(W)
    assert base.svd.U.shape[1] == KEEP and torch.equal(base.left[:, KEEP:], base.left[:, KEEP:].half().float())
    U = np.linalg.svd(W.double().numpy(), full_matrices=False)[0]
    cosines, where = base.largest_cosines(torch.tensor(U[:, [0, KEEP + 50]]).float())
    assert cosines.tolist() == pytest.approx([1, 1], abs=1e-3) and where.tolist() == [0, KEEP + 50]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "bases").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        cached(weight(), tmp_path / "bases")


def test_two_that_need_it_at_once_make_it_once(tmp_path, monkeypatch):
    """The second waits for the first, then reads; flock holds between threads too, each having opened the lock."""
    made = []

    def slow(weight):
        made.append(time.sleep(0.3))
        return decompose(weight)

    monkeypatch.setattr(bases, "decompose", slow)
    W = weight()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cached(W, tmp_path), range(4)))
    assert len(made) == 1 and all(torch.equal(layer.svd.U, found[0].svd.U) for layer in found)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
