"""Images/s and memory of training a ViT, all of lorabench's measuring on, beside a plain PEFT loop and HF Trainer.

The same as `training.py`, on images: one model, one set of batches, made ready once before any of the three begins.

    python benchmarks/vision.py                                                      # some minutes on a CPU
    python benchmarks/vision.py --device cuda --dtype bfloat16 --model google/vit-base-patch16-224 --batch-size 64
"""

from __future__ import annotations

from training import IMAGES, main

if __name__ == "__main__":
    main("vision", IMAGES, model="builtin:tiny-vit", batch_size=16)
