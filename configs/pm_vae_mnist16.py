"""PM-VAE on 16x16 MNIST with few observed pixels: the base of `lookahead_mnist16` (paper, section 4.3).

python train_pm_vae.py --config configs/pm_vae_mnist16.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vae_image(
        latent_dim=10,
        encoder_layers=((32, 3, 1), (32, 3, 2), (64, 3, 2), (64, 1, 1)),
        decoder_layers=((64, 8, 1), (64, 5, 2), (32, 5, 1), (32, 5, 1), (1, 3, 1)),
        partial_posterior={"name": "TriLGaussian"},
    )
    config.dataset = "mnist16"
    config.mask_generator = {"name": "UniformMaskGenerator", "bounds": (0.0, 0.2)}
    config.batch_size = 128
    config.steps = 200_000
    config.validation_every = 10_000
    return config
