"""PM-VAE on scikit-learn's 8x8 digits: what `make demo` runs."""

from configs import common


def get_config():
    config = common.pm_vae_image(
        latent_dim=10,
        encoder_layers=((32, 3, 1), (64, 3, 2), (128, 4, 1)),
        decoder_layers=((64, 4, 1), (32, 3, 2), (1, 3, 1)),
        partial_posterior=common.autoregressive_gmm(residual_blocks=2),
    )
    config.dataset = "digits"
    config.mask_generator = {"name": "MNISTMaskGenerator", "dim": 8}
    config.batch_size = 64
    config.steps = 2000
    config.validation_every = 200
    config.optimizer.transition_steps = 500
    return config
