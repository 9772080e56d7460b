"""Tiny random pipelines of diffusers' own classes, as their `save_pretrained` leaves them: Stable Diffusion and kin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

CHARACTERS = [chr(number) for number in range(33, 127)]
ENDS = "<|startoftext|>", "<|endoftext|>"


def _tokenizer(folder: Path) -> Any:
    """CLIP's, of single characters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = [*CHARACTERS, *(f"{character}</w>" for character in CHARACTERS), *ENDS]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def _words() -> Any:
    """A tokenizer for T5's encoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {character: place for place, character in enumerate(CHARACTERS, 3)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ends = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **ends)


def _clip(projects: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    start = 2 * len(CHARACTERS)
    config = CLIPTextConfig(
        vocab_size=start + 2, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=start, eos_token_id=start + 1, pad_token_id=1, projection_dim=32,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))


def _vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[16, 32], in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=8, sample_size=16, **options,
    )  # fmt: skip


def _unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **options,
    )  # fmt: skip


def stable_diffusion(folder: Path) -> Path:
    """Of 16 × 16 pixels, latents of 8 × 8; learns noise."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    StableDiffusionPipeline(
        vae=_vae(), text_encoder=_clip(), tokenizer=_tokenizer(folder / "words"),
        unet=_unet(cross_attention_dim=32, attention_head_dim=8),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, **noise),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")  # fmt: skip
    return folder / "pipeline"


def sdxl(folder: Path) -> Path:
    """The same with two encoders of texts, told the image's size; learns velocity."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    tokenizer = _tokenizer(folder / "words")
    unet = _unet(
        cross_attention_dim=64, attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_clip(), text_encoder_2=_clip(True), tokenizer=tokenizer, tokenizer_2=tokenizer,
        unet=unet, scheduler=EulerDiscreteScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
    ).save_pretrained(folder / "pipeline")  # fmt: skip
    return folder / "pipeline"


SHIFTED = {"shift_factor": 0.06, "scaling_factor": 1.5, "use_quant_conv": False, "use_post_quant_conv": False}


def sd3(folder: Path) -> Path:
    """A transformer, and flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    tokenizer = _tokenizer(folder / "words")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_vae(**SHIFTED),
        text_encoder=_clip(True), tokenizer=tokenizer, text_encoder_2=_clip(True), tokenizer_2=tokenizer,
        text_encoder_3=_t5(), tokenizer_3=_words(),
    ).save_pretrained(folder / "pipeline")  # fmt: skip
    return folder / "pipeline"


def flux(folder: Path) -> Path:
    """The same with double and single blocks, told its guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(**SHIFTED), text_encoder=_clip(), tokenizer=_tokenizer(folder / "words"), text_encoder_2=_t5(),
        tokenizer_2=_words(),
    ).save_pretrained(folder / "pipeline")  # fmt: skip
    return folder / "pipeline"


MAKERS = {"stable_diffusion": stable_diffusion, "sdxl": sdxl, "sd3": sd3, "flux": flux}
