"""What an adapter holds beside ΔW, against what PEFT trained: a copy must have it too."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

from lorabench.updates import formats

pytestmark = pytest.mark.filterwarnings("ignore")
QWEN = Qwen2Config(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                   num_key_value_heads=1, vocab_size=30, tie_word_embeddings=False)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"bias": "lora_only"}, [f"model.layers.{i}.self_attn.q_proj.bias" for i in (0, 1)]),
        ({"lora_bias": True}, [f"model.layers.{i}.self_attn.q_proj.lora_B.bias" for i in (0, 1)]),
        (
            {"modules_to_save": ["norm", "lm_head"]},
            [f"model.layers.{i}.{kind}_layernorm.weight" for i in (0, 1) for kind in ("input", "post_attention")]
            + ["model.norm.weight", "lm_head.weight"],
        ),
        ({"trainable_token_indices": [3, 5]}, ["model.embed_tokens.token_adapter.trainable_tokens_delta"]),
    ],
    ids=["bias", "lora_bias", "modules_to_save", "tokens"],
)
def test_what_is_saved_whole(options, names, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_config(QWEN),
        LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False, **options),
    )
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    adapter = formats.open_adapter(tmp_path)
    assert sorted(adapter.others) == sorted(names) and adapter.left_out == ()
    saved = [other.load() for other in adapter.others.values()]
    others = [p for name, p in trained.items() if ".lora_" not in name or name.endswith("lora_B.default.bias")]
    assert len(saved) == len(others)
    assert all(any(torch.equal(tensor, parameter) for parameter in others) for tensor in saved)
    assert adapter.config["peft_type"] == "LORA" and options.items() <= adapter.config.items()
