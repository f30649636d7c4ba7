"""PM-VDVAE on CelebA at 64x64, for several accelerators. Not an experiment of the paper, and not run.

    python train_pm_vdvae.py --config configs/pm_vdvae_celeb_a.py

Blocks are recomputed in the backward pass and convolutions use bfloat16, to fit 4 images per device.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vdvae()
    config.dataset = "celeb_a"
    config.mask_generator = {"name": "CelebAMaskGenerator"}
    config.batch_size = 4
    config.optimizer.warmup_steps = 100
    config.model.encoder = "64x6,64d2,32x6,32d2,16x4,16d2,8x3,8d2,4x2,4d4,1x2"
    config.model.decoder = "1x2,4m1,4x2,8m4,8x3,16m8,16x5,32m16,32x8,64m32,64x6"
    config.model.rematerialise = True
    config.model.compute_dtype = "bfloat16"
    return config
