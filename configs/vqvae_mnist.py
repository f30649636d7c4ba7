"""VQ-VAE on MNIST, the base of `pm_vqvae_mnist`.

python train_vqvae.py --config configs/vqvae_mnist.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.vqvae(hidden_units=32, residual_units=32, codebook_size=256)
    config.dataset = "mnist"
    config.batch_size = 32
    config.steps = 60_000
    config.validation_every = 1000
    return config
