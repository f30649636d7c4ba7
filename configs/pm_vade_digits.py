"""PM-VaDE on scikit-learn's 8x8 digits, about 1 minute on 2 CPU cores.

python train_pm_vade.py --config configs/pm_vade_digits.py --config.vade_dir=RUN
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vade()
    config.model = {
        "partial_encoder": None,  # the VaDE encoder's, with its own weights
        "partial_posterior": common.autoregressive_gmm(residual_blocks=1, hidden_units=128),
    }
    config.dataset = "digits"
    config.mask_generator = {  # uniform masks are rarely almost complete and never complete
        "name": "MixtureMaskGenerator",
        "generators": ({"name": "UniformMaskGenerator"}, {"name": "BernoulliMaskGenerator", "p": 1.0}),
        "weights": (3.0, 1.0),
    }
    config.noise_std = 0.05
    config.ema_decay = 0.995
    config.batch_size = 128
    config.steps = 2000
    config.validation_every = 500
    config.optimizer.transition_steps = 200
    return config
