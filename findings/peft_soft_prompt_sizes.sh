#!/usr/bin/env bash
# PEFT 0.21.2 on transformers 5.23.0: it reads the sizes of soft prompts off the names that a model's configuration uses,
# and some are not what it takes them for. Falcon 7B (`multi_query`) has one key and one value for all heads, PEFT makes
# a prefix with one a head; OPT 350m embeds narrower (`word_embed_proj_dim`) than it computes (`hidden_size`), PEFT makes
# a prompt of the latter width: both are attached, and fail at the first forward pass. DistilBERT's `dim` and `n_heads`
# it does not know at all. With `token_dim` and `num_attention_heads` given all three compute.
#
# Seen (torch 2.13.0):
#   falcon prefix      RuntimeError, given: computes
#   opt prompt         RuntimeError, given: computes
#   distilbert prompt  ValueError, given: computes
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
import transformers as t
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

warnings.simplefilter("ignore")
plain = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
models = {
    "falcon prefix": lambda: t.FalconForCausalLM(t.FalconConfig(**plain)),
    "opt prompt": lambda: t.OPTForCausalLM(t.OPTConfig(ffn_dim=64, word_embed_proj_dim=16, **plain)),
    "distilbert prompt": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(vocab_size=128, dim=32, hidden_dim=64, n_layers=2, n_heads=4)
    ),
}
sizes = {
    "falcon prefix": dict(token_dim=8, num_attention_heads=1),
    "opt prompt": dict(token_dim=16, num_attention_heads=4),
    "distilbert prompt": dict(token_dim=32, num_attention_heads=4),
}


def attempt(name, **given):
    kind = PrefixTuningConfig if "prefix" in name else PromptTuningConfig
    task = "SEQ_CLS" if "distilbert" in name else "CAUSAL_LM"
    try:
        tuned = get_peft_model(models[name](), kind(num_virtual_tokens=4, task_type=task, **given)).eval()
        tuned(input_ids=torch.arange(8)[None])
        return "computes"
    except (RuntimeError, ValueError) as error:
        return type(error).__name__


seen = {name: (attempt(name), attempt(name, **sizes[name])) for name in models}
for name, (plainly, given) in seen.items():
    print(f"{name:18} {plainly}, given: {given}")
assert [*seen.values()] == [("RuntimeError", "computes")] * 2 + [("ValueError", "computes")], seen
PY
