import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from lorabench.data.builtin import digits, pretrain_vit
from lorabench.data.builtin.collect import HERE, jsonl_gz
from lorabench.data.images import processed
from lorabench.models.base_model import load_image_processor

MODEL = HERE / "tiny-vit"


@pytest.fixture(scope="module")
def loaded():
    return AutoModelForImageClassification.from_pretrained(MODEL, dtype=torch.float32, output_loading_info=True)


def test_made_again_the_digits_have_the_same_bytes():
    for name, parts in digits.make().items():
        for split, part in parts.items():
            assert jsonl_gz(part) == (HERE / name / f"{split}.jsonl.gz").read_bytes()


def test_turned_digits_are_the_upright_ones_turned_back_and_inverted():
    for split, part in digits.make()["digits-turned"].items():
        upright, labels = pretrain_vit.images(split)
        back = 255 - np.rot90(np.array([each.image for each in part]), -1, (1, 2))
        assert (back == upright.numpy()).all() and labels.tolist() == [each.label for each in part]


def test_its_files_are_small_and_its_shapes_suit_4_bit_blocks(loaded):
    model, report = loaded
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 1_200_000
    assert not any(report.values())
    width, inner, patches = 128, 256, (8 // 2) ** 2
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    embeddings = 3 * 2 * 2 * width + width + (patches + 2) * width
    assert model.num_parameters() == embeddings + 4 * block + 2 * width + 10 * width + 10
    assert {each.dtype for each in load_file(MODEL / "model.safetensors").values()} == {torch.bfloat16}


def test_it_was_made_by_the_script_as_it_stands(loaded):
    about = json.loads((MODEL / "training.json").read_text())
    assert (about["seed"], about["steps"]) == (pretrain_vit.SEED, pretrain_vit.STEPS)
    for name in ("digits", "digits-turned"):
        found = pretrain_vit.scores(loaded[0], "test", name)
        assert found["loss"] == pytest.approx(about["losses"][f"{name}/test"], rel=1e-3)
        assert found["accuracy"] == pytest.approx(about["accuracies"][f"{name}/test"], abs=1e-3)


def test_what_it_saw_in_training_is_what_its_processor_makes():
    values, _ = pretrain_vit.images("test")
    full = [np.repeat(each[:, :, None], 3, 2).astype(np.uint8) for each in values[:4].numpy()]
    seen = np.stack([each.seen() for each in processed(full, load_image_processor("builtin:tiny-vit"))])
    assert torch.allclose(torch.from_numpy(seen), pretrain_vit.seen(values[:4]), atol=1e-6)


def test_pretraining_is_bit_identical_and_makes_the_shipped_files(one_thread, tmp_path):
    for name in ("first", "second"):
        pretrain_vit.save(pretrain_vit.fit(steps=2), tmp_path / name)
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("first", "second"))
    assert "model.safetensors" in first and first == second
    for name in ("config.json", "preprocessor_config.json"):
        assert first[name].replace(b"float32", b"bfloat16") == (MODEL / name).read_bytes()
