"""PM-VDVAE on scikit-learn's 8x8 digits, about 9 minutes on 2 CPU cores.

    python train_pm_vdvae.py --config configs/pm_vdvae_digits.py

Pixels take 17 values, 0..16, so a uniform guess costs log2(17) = 4.09 bits per dimension.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vdvae()
    config.dataset = "digits"
    config.mask_generator = {
        "name": "MixtureMaskGenerator",
        "generators": ({"name": "BernoulliMaskGenerator", "p": 0.5}, {"name": "MNISTMaskGenerator", "dim": 8}),
        "weights": (1.0, 1.0),
    }
    config.model.encoder = "8x2,8d2,4x2,4d2,2d2,1x1"
    config.model.decoder = "1x1,2m1,4m2,4x2,8m4,8x2"
    config.model.latent_dim = 8
    config.model.width = 64
    config.model.num_components = 5
    config.model.num_levels = 17
    config.ema_decay = 0.99
    config.batch_size = 32
    config.steps = 5000
    config.validation_every = 500
    config.optimizer.learning_rate = 1e-3
    config.optimizer.decay_rate = 0.5
    config.optimizer.transition_steps = 1700
    config.optimizer.warmup_steps = 100
    return config
