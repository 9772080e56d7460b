"""Well-known models by their shapes alone, without weights: what a method would train and take there can be counted."""

from __future__ import annotations

from typing import Any, Literal

Shape = Literal["llama-2-7b", "bert-base"]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
    "bert-base": {
        "model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512, "type_vocab_size": 2,
    },
}  # fmt: skip
"""As their `config.json` has them: Llama-2-7b of Touvron et al. 2023 (6,738,415,616 parameters), BERT-base-uncased of
Devlin et al. 2019 (109,482,240, without a task's head)."""
NAMES = {"llama-2-7b": "Llama-2-7B", "bert-base": "BERT-base"}


def config(shape: Shape) -> Any:
    """The model's configuration, as transformers has it."""
    import transformers

    return transformers.AutoConfig.for_model(**CONFIGS[shape])
