"""Adapters in the wild that are damaged, ambiguous, or no adapter: each gets one error that says where and what."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorabench.config.decode import InputError
from lorabench.updates import formats
from tests.wild import ADAPTERS, copy, edit

DAMAGED = {
    "adapterhub_bert": "query.loras.task.lora_B",
    "diffusers_plain": "conv1.lora_B.weight",
    "diffusers_processor": "attn1.processor.to_q_lora.up.weight",
    "kohya_unet": "conv1.lora_up.weight",
    "loralib_lora": "linear.lora_B",
    "lycoris_locon": "conv.lora_mid.weight",
    "lycoris_loha": "conv.hada_w2_a",
    "lycoris_loha_tucker": "conv.hada_t2",
    "lycoris_lokr_both": "proj.lokr_w2_a",
    "mlx_lora": "q_proj.lora_b",
    "torchtune_alone": "w1.lora_b.weight",
}
"""The tensor that is damaged, of a layer that the error must name."""


def damaged(name: str, folder: Path, change) -> tuple[Path, str, tuple[int, ...]]:
    """A copy with one tensor changed; the file, the tensor and its shape now."""
    file, shapes = copy(name, folder), {}

    def one(tensors):
        key = next(key for key in sorted(tensors) if key.endswith(DAMAGED[name]))
        tensors[key] = change(tensors[key]).contiguous()
        shapes[key] = tuple(tensors[key].shape)

    edit(file, one)
    ((key, shape),) = shapes.items()
    return file, key, shape


@pytest.mark.parametrize("name", DAMAGED)
def test_shapes_that_do_not_fit_are_told_with_file_layer_and_both_shapes(name, tmp_path):
    axis = 0 if name.startswith("mlx") else 1
    file, _, shape = damaged(name, tmp_path, lambda tensor: torch.cat([tensor, tensor], axis))
    with pytest.raises(InputError, match="do not fit each other") as error:
        formats.open_adapter(tmp_path)
    text, layer = str(error.value), DAMAGED[name].partition(".")[0]
    assert str(file) in text and layer in text and str(shape) in text and len(re.findall(r"\(\d+, ", text)) >= 2


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_told_with_file_and_tensor(name, value, tmp_path):
    def spoil(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    file, key, _ = damaged(name, tmp_path, spoil)
    adapter = formats.open_adapter(tmp_path)
    with pytest.raises(InputError, match="NaN or Inf") as error:
        list(formats.load_layers(adapter))
    assert str(file) in str(error.value) and key in str(error.value)


@pytest.mark.parametrize("name", [name for name in DAMAGED if not name.startswith("lycoris")])
def test_a_factor_without_its_other_is_told(name, tmp_path):
    file = copy(name, tmp_path)
    edit(file, lambda tensors: tensors.pop(next(key for key in sorted(tensors) if key.endswith(DAMAGED[name]))))
    with pytest.raises(InputError, match=r"no such tensor") as error:
        formats.open_adapter(tmp_path)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("kind", ["prefix", "bottleneck"])
def test_what_has_no_update_is_not_applicable(kind):
    with pytest.raises(InputError, match="not applicable: it has no ΔW"):
        formats.open_adapter(ADAPTERS / f"adapterhub_{kind}" / "adapter")


ADAPTERHUB = {
    "architecture": ("union", "only lora can be read"),
    "composition_mode": ("scale", "its ΔW is not s B A"),
    "use_gating": (True, "its ΔW is not s B A"),
    "vera_d": (0.1, "its ΔW is not s B A"),
    "alpha": (None, "must be a number above 0"),
    "r": (4, "factors have rank 2"),
}


@pytest.mark.parametrize("key", ADAPTERHUB)
def test_adapterhub_configurations_that_are_refused(key, tmp_path):
    copy("adapterhub_bert", tmp_path)
    file, (value, message) = tmp_path / "adapter_config.json", ADAPTERHUB[key]
    config = json.loads(file.read_text())
    config["config"][key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        formats.open_adapter(tmp_path)


def test_an_alpha_of_several_numbers(tmp_path):
    edit(copy("lycoris_lora", tmp_path), lambda tensors: tensors.update({"lora_unet_proj.alpha": torch.ones(2)}))
    with pytest.raises(InputError, match=r"lora_unet_proj.alpha: shape \(2,\): must be one number"):
        formats.open_adapter(tmp_path)


HEADERS = {
    "{": "not valid JSON",
    "[]": "must be a JSON object",
    '{"unet.r": 7, "unet.lora_alpha": 1}': "r = 7 for .*: its factors have rank 2",
    '{"unet.r": 2}': "lora_alpha = None: must be a number",
    '{"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": "pissa"}': "needs the initial factors",
    '{"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"(": 1}}': "not a regular expression",
    '{"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {"(a+)+b": 1}}': "may take without end to match",
    '{"unet.r": 2, "unet.lora_alpha": 2, "unet.use_qalora": true}': "its ΔW is not s B A",
}


@pytest.mark.parametrize("header", HEADERS)
def test_diffusers_headers_that_say_no_scale(header, tmp_path):
    tensors = {f"unet.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": header})
    with pytest.raises(InputError, match=HEADERS[header]):
        formats.open_adapter(tmp_path)


def test_a_fused_layer_of_too_few_rows(tmp_path):
    name, up, down = "lora_unet_single_blocks_0_linear1.lora_{}.weight", "up", "down"
    save_file({name.format(up): torch.ones(20, 1), name.format(down): torch.ones(1, 8)}, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="20 rows cannot be split into q, k and v of 8 each"):
        formats.open_adapter(tmp_path)


def test_a_product_that_is_much_larger_than_its_file(tmp_path):
    tensors = {f"lora_unet_x.lokr_w{i}": torch.ones(1000, 1000, dtype=torch.float16) for i in (1, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"lora_unet_x.weight: lokr_w1 \(1000, 1000\).* more than 2³¹ entries"):
        formats.open_adapter(tmp_path)


def test_several_adapters_in_one_folder(tmp_path):
    file = copy("lycoris_lora", tmp_path)
    shutil.copy(file, tmp_path / "adapter-000002.safetensors")
    with pytest.raises(InputError, match=r"several adapters: name one of adapter-000002.safetensors, adapter.safet"):
        formats.open_adapter(tmp_path)
    assert len(formats.open_adapter(file).entries) == 3


def test_what_trainers_leave_beside_an_adapter_is_not_opened(tmp_path):
    copy("lycoris_lora", tmp_path)
    for name in ("optimizer.pt", "training_args.bin"):
        (tmp_path / name).write_bytes(b"a pickle of something else")
    assert len(formats.open_adapter(tmp_path).entries) == 3


@pytest.mark.parametrize(("name", "place"), [("mlx_lora", "lora_parameters"), ("adapterhub_bert", "config")])
def test_fields_of_a_configuration_that_nobody_knows(name, place, tmp_path):
    copy(name, tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config[place]["sparkle"] = 3
    file.write_text(json.dumps(config))
    adapter = formats.open_adapter(tmp_path)
    assert adapter.left_out == (f"adapter_config.json: {place}.sparkle",)
    assert adapter.notes[-1] == f"1 field left out, such as adapter_config.json: {place}.sparkle"


@pytest.mark.parametrize("name", ["mlx_lora", "adapterhub_bert", "adapterhub_prefix", "torchtune_lora"])
def test_a_file_of_another_format_beside_a_configuration(name, tmp_path):
    """Given by its own name, it is read by what is in it."""
    shutil.copytree(ADAPTERS / name / "adapter", tmp_path, dirs_exist_ok=True)
    other = shutil.copy(next((ADAPTERS / "lycoris_lora" / "adapter").iterdir()), tmp_path / "other.safetensors")
    adapter = formats.open_adapter(other)
    assert (adapter.format, len(adapter.entries), adapter.scale_source) == ("kohya", 3, "file")


def test_mlx_weights_that_are_no_adapter(tmp_path):
    copy("mlx_lora", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fine_tune_type": "full"}))
    with pytest.raises(InputError, match="fine_tune_type = full: tuned weights, no adapter"):
        formats.open_adapter(tmp_path)
