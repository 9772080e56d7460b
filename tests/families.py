"""The smallest models of each supported family, random, of two blocks; made from their configuration alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as t

_IDS = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
_PLAIN = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "vocab_size": 1024, "max_position_embeddings": 64} | _IDS  # fmt: skip
_SHORT = {"vocab_size": 1024, "n_layer": 2, "n_head": 4} | _IDS
_GROUPED = _PLAIN | {"num_key_value_heads": 2}
_HEADED = _GROUPED | {"head_dim": 8}
_EXPERTS = _HEADED | {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_SHARED = _EXPERTS | {"shared_expert_intermediate_size": 24}
_STATES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 1024} | _IDS
_T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 1024} | _IDS
_SIDES = {f"{side}_{key}": value for side in ("encoder", "decoder")
          for key, value in {"layers": 2, "ffn_dim": 64, "attention_heads": 4}.items()}  # fmt: skip
_LATENT = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

CONFIGS: dict[str, partial[Any]] = {
    "llama": partial(t.LlamaConfig, **_GROUPED),
    "qwen2": partial(t.Qwen2Config, **_GROUPED),
    "qwen3": partial(t.Qwen3Config, **_HEADED),
    "gemma": partial(t.GemmaConfig, **_HEADED),
    "gemma2": partial(t.Gemma2Config, **_HEADED),
    "gemma3": partial(t.Gemma3TextConfig, **_HEADED),
    "phi3": partial(t.Phi3Config, **_GROUPED),
    "mistral": partial(t.MistralConfig, **_GROUPED),
    "gpt2": partial(t.GPT2Config, n_embd=32, n_positions=64, **_SHORT),
    "gptj": partial(t.GPTJConfig, n_embd=32, n_positions=64, rotary_dim=4, **_SHORT),
    "codegen": partial(t.CodeGenConfig, n_embd=32, n_positions=64, rotary_dim=4, **_SHORT),
    "gpt_neox": partial(t.GPTNeoXConfig, **_PLAIN),
    "opt": partial(t.OPTConfig, ffn_dim=64, word_embed_proj_dim=32, **_PLAIN),
    "falcon": partial(t.FalconConfig, **_PLAIN),
    "bloom": partial(t.BloomConfig, hidden_size=32, **_SHORT),
    "bert": partial(t.BertConfig, **_PLAIN),
    "roberta": partial(t.RobertaConfig, **_PLAIN),
    "deberta-v2": partial(t.DebertaV2Config, relative_attention=True, pos_att_type="p2c|c2p", position_buckets=8,
                          share_att_key=True, **_PLAIN),
    "modernbert": partial(t.ModernBertConfig, cls_token_id=0, sep_token_id=1, **_PLAIN),
    "distilbert": partial(t.DistilBertConfig, dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=1024,
                          max_position_embeddings=64, **_IDS),
    "t5": partial(t.T5Config, decoder_start_token_id=2, **_T5),
    "t5-gated": partial(t.T5Config, decoder_start_token_id=2, feed_forward_proj="gated-gelu", **_T5),
    "bart": partial(t.BartConfig, d_model=32, vocab_size=1024, max_position_embeddings=64, num_labels=2, **_SIDES,
                    **_IDS),
    "mamba": partial(t.MambaConfig, **_STATES),
    "mamba2": partial(t.Mamba2Config, num_heads=8, head_dim=8, n_groups=2, **_STATES),
    "mixtral": partial(t.MixtralConfig, num_local_experts=4, **_GROUPED),
    "qwen2-moe": partial(t.Qwen2MoeConfig, **_SHARED),
    "qwen3-moe": partial(t.Qwen3MoeConfig, **_EXPERTS),
    "llama4": partial(t.Llama4TextConfig, intermediate_size_mlp=64, num_local_experts=4, interleave_moe_layer_step=1,
                      **_HEADED),
    "olmoe": partial(t.OlmoeConfig, num_experts=4, num_experts_per_tok=2, **_GROUPED),
    "deepseek-v3": partial(t.DeepseekV3Config, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4,
                           num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, **_LATENT,
                           **_PLAIN),
    "qwen3-next": partial(t.Qwen3NextConfig, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
                          linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"], **_SHARED),
    "gpt-oss": partial(t.GptOssConfig, num_local_experts=4, num_experts_per_tok=2, **_HEADED),
}  # fmt: skip
_SEEN = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
         "patch_size": 4}  # fmt: skip
_STAGES = {"depths": [1, 1], "image_size": 8, "patch_size": 2, "drop_path_rate": 0.0}
VISION: dict[str, partial[Any]] = {
    "vit": partial(t.ViTConfig, **_SEEN),
    "deit": partial(t.DeiTConfig, architectures=["DeiTForImageClassification"], **_SEEN),
    "dinov2": partial(t.Dinov2Config, mlp_ratio=2, **{k: v for k, v in _SEEN.items() if k != "intermediate_size"}),
    "swin": partial(t.SwinConfig, embed_dim=16, num_heads=[2, 4], window_size=2, **_STAGES),
    "convnext": partial(t.ConvNextConfig, hidden_sizes=[16, 32], num_stages=2, layer_scale_init_value=1.0, **_STAGES),
}
"""Families of models of images, of 8 × 8 pixels, with a head for classes."""
CLASSIFIERS = ("bert", "roberta", "deberta-v2", "modernbert", "distilbert", "t5", "t5-gated", "bart")
"""Families that are used with a classification head here; the others are language models."""


def make(name: str, device: str = "meta") -> Any:
    """A model of the family; on another device than `meta` its weights are random, by the global generator."""
    head = t.AutoModelForSequenceClassification if name in CLASSIFIERS else t.AutoModelForCausalLM
    head = t.AutoModelForImageClassification if name in VISION else head
    with torch.device(device):
        return head.from_config((CONFIGS | VISION)[name]())
