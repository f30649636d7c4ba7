"""VQ-VAE on CelebA at 64x64, the base of `pm_vqvae_celeb_a`.

    python train_vqvae.py --config configs/vqvae_celeb_a.py

With aligned faces in files of 89x109 pixels, half of CelebA's size:

    python train_vqvae.py --config configs/vqvae_celeb_a.py --config.dataset=faces.zip \
        --config.images.crop="(22, 12, 64, 64)"
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.vqvae(hidden_units=128, residual_units=32, codebook_size=512)
    config.dataset = "celeb_a"
    config.batch_size = 64
    config.steps = 100_000
    config.validation_every = 1000
    return config
