"""PM-VAE on MNIST (paper, figure 3).

python train_pm_vae.py --config configs/pm_vae_mnist.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vae_image(
        latent_dim=32,
        encoder_layers=((32, 5, 1), (32, 5, 2), (64, 5, 1), (64, 5, 2), (128, 7, 1)),
        decoder_layers=((64, 7, 1), (64, 5, 2), (32, 5, 1), (32, 5, 2), (32, 5, 1), (1, 5, 1)),
        partial_posterior=common.autoregressive_gmm(residual_blocks=2),
    )
    config.dataset = "mnist"
    config.mask_generator = {"name": "MNISTMaskGenerator", "dim": 28}
    config.batch_size = 256
    config.steps = 80_000
    config.validation_every = 1000
    return config
