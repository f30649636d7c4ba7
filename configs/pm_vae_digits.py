"""PM-VAE on scikit-learn's 8x8 digits, as run by `make demo`; about 2 minutes on 2 CPU cores.

    python train_pm_vae.py --config configs/pm_vae_digits.py

There are only 1,257 training images: without averaged weights (EMA) and noise on the images, imputations are worse than
nearest neighbours'.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vae_image(
        latent_dim=16,
        encoder_layers=((32, 3, 1), (64, 3, 2), (128, 4, 1)),
        decoder_layers=((64, 4, 1), (32, 3, 2), (1, 3, 1)),
        partial_posterior=common.autoregressive_gmm(residual_blocks=2),
    )
    config.dataset = "digits"
    config.model.likelihood = {"name": "IdentityGaussian"}  # 17 grey levels, most neither black nor white
    config.matching_ll_stop_gradients = True
    config.mask_generator = {
        "name": "MixtureMaskGenerator",
        "generators": ({"name": "BernoulliMaskGenerator", "p": 0.5}, {"name": "MNISTMaskGenerator", "dim": 8}),
        "weights": (1.0, 1.0),
    }
    config.noise_std = 0.05
    config.beta = {"name": "monotonic", "low": 0.0, "high": 1.0, "transition_begin": 200, "transition_steps": 1000}
    config.ema_decay = 0.995
    config.batch_size = 64
    config.steps = 4000
    config.validation_every = 500
    config.evaluate_checkpoint = "latest"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.transition_steps = 400
    config.optimizer.weight_decay = 1e-3
    return config
