"""What other tools call a key or a measure -> what lorabench does, for "did you mean".

The words are those of transformers' TrainingArguments, PEFT, TRL, bitsandbytes, axolotl and LLaMA-Factory. A key is
told as a sweep file has it, in full; what is to be known of it stands behind a colon.
"""

from __future__ import annotations

from collections.abc import Mapping

WORDS = {
    # the model and its weights
    "model_name_or_path": "model",
    "model_name": "model",
    "base_model": "model",
    "bits": 'quantization: "nf4" is of 4 bits, "int8" of 8',
    "load_in_4bit": 'quantization = "nf4"',
    "load_in_8bit": 'quantization = "int8"',
    "quantization_bit": 'quantization: "nf4" is of 4 bits, "int8" of 8',
    "bnb_4bit_quant_type": 'quantization = "nf4"',
    "bf16": 'dtype = "bfloat16"',
    "fp16": 'dtype = "bfloat16"',
    "torch_dtype": "dtype",
    # data
    "dataset": "task.data",
    "dataset_name": "task.data",
    "dataset_path": "task.data",
    "train_file": "task.data",
    "task_type": "task.name",
    "dataset_text_field": "task.text",
    "text_column": "task.text",
    "label_column": "task.label",
    "max_train_samples": "task.max_train",
    "max_eval_samples": "task.max_eval",
    "max_new_tokens": "task.generate.max_new_tokens",
    "max_seq_length": "seq_len",
    "max_seq_len": "seq_len",
    "max_length": "seq_len",
    "model_max_length": "seq_len",
    "sequence_len": "seq_len",
    "cutoff_len": "seq_len",
    # the method
    "peft_type": "method.name",
    "finetuning_type": "method.name",
    "r": "method.rank",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "target_modules": "method.targets",
    "lora_target": "method.targets",
    "lora_target_modules": "method.targets",
    "layers_to_transform": "method.layers",
    "use_rslora": "method.rslora",
    "use_dora": "method.dora",
    "init_lora_weights": "method.init",
    "loraplus_lr_ratio": "method.lr_ratio",
    "num_virtual_tokens": "method.num_tokens",
    # training
    "learning_rate": "lr",
    "optim": "optimizer",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup: a share of the steps",
    "max_grad_norm": "clip",
    "grad_clip": "clip",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "epsilon",
    "per_device_train_batch_size": "batch_size: over all devices",
    "train_batch_size": "batch_size: over all devices",
    "padding_free": 'padding = "free"',
    "gradient_accumulation_steps": "micro_batch_size: the examples of a forward pass",
    "max_steps": "steps",
    "num_steps": "steps",
    "num_train_epochs": "steps: the length of a run is told in steps, not in epochs",
    "num_epochs": "steps: the length of a run is told in steps, not in epochs",
    "epochs": "steps: the length of a run is told in steps, not in epochs",
    "eval_steps": "eval_every",
    "save_steps": "snapshot_every",
    "random_seed": "seed",
    "data_seed": "seed",
    # measures
    "val_loss": "valid_loss",
    "eval_loss": "valid_loss",
    "validation_loss": "valid_loss",
    "loss": "valid_loss",
    "perplexity": "valid_perplexity",
    "eval_accuracy": "valid_accuracy",
    "val_accuracy": "valid_accuracy",
    "accuracy": "valid_accuracy",
    "acc": "valid_accuracy",
    "acc_norm": "valid_accuracy_norm",
    "trainable_params": "num_trainable",
    "num_params": "num_parameters",
    "peak_memory": "peak_gib",
    "max_memory": "peak_gib",
    "gpu_memory": "peak_gib",
    "tokens_per_sec": "tokens_per_second",
    "train_runtime": "train_seconds",
}

METHODS = {
    "qlora": 'lora: with quantization = "nf4"',
    "dora": "lora: with method.dora = true",
    "rslora": "lora: with method.rslora = true",
    "lora+": "lora: with method.lr_ratio = 16.0",
    "loraplus": "lora: with method.lr_ratio = 16.0",
    "pissa": 'lora: with method.init = "pissa"',
    "olora": 'lora: with method.init = "olora"',
    "loftq": 'lora: with method.init = "loftq"',
    "milora": 'lora: with method.init = "milora"',
    "eva": 'lora: with method.init = "eva"',
    "corda": 'lora: with method.init = "corda"',
    "lora-ga": 'lora: with method.init = "lora_ga"',
    "lora-fa": 'lora: with optimizer = "lora_fa"',
    "relora": "lora: with method.restart_every = 100",
    "adapters": "adapter",
    "bottleneck": "adapter",
    "prompt_tuning": "prompt",
    "prefix_tuning": "prefix",
    "p_tuning": "ptuning",
    "full_finetuning": "full",
    "fft": "full",
}
"""What elsewhere is called a method, and here may be a field of one."""
OF_TORCH = ("Adam", "Adamax", "Adadelta", "Adafactor", "Adagrad", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
OPTIMIZERS = {
    **{name.lower(): f'torch: with optimizer.type = "{name}"' for name in OF_TORCH},
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "lora-fa": "lora_fa",
}
"""Classes of torch, and what transformers calls its own."""


def hint(word: str, words: Mapping[str, str] = WORDS) -> str:
    """`Did you mean 'steps'? The length of a run is told in steps, not in epochs.`; empty of a word of no tool."""
    name, _, note = words.get(word.rpartition(".")[2].lower(), "").partition(": ")
    return f"Did you mean '{name}'?{f' {note[0].upper()}{note[1:]}.' if note else ''}" if name else ""
