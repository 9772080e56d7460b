"""Images/s and memory of training a ViT, all of lorabench's measuring on, beside a plain PEFT loop and HF Trainer.

And of a denoiser, beside the loop of diffusers' DreamBooth example. The same as `training.py`, on images: one model,
one set of batches, made ready once before any of them begins. Of diffusion each draws its own noise, so that not each
loss is the other's, but their mean.

    python benchmarks/vision.py                                                      # some minutes on a CPU
    python benchmarks/vision.py --device cuda --dtype bfloat16 --model google/vit-base-patch16-224 --batch-size 64
"""

from __future__ import annotations

from training import DIFFUSION, IMAGES, main

if __name__ == "__main__":
    main("vision", [*IMAGES, *DIFFUSION], model="builtin:tiny-vit", batch_size=16)
