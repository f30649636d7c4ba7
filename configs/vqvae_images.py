"""VQ-VAE on images of your own, the base of `pm_vqvae_images`; height and width are multiples of 4.

python train_vqvae.py --config configs/vqvae_images.py --config.dataset=photos --config.images.size=32
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.vqvae(hidden_units=128, residual_units=32, codebook_size=256)
    common.for_images(config)
    config.batch_size = 64
    config.steps = 50_000
    return config
