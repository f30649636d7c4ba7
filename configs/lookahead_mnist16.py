"""Lookahead posteriors on `pm_vae_mnist16` (paper, section 4.3).

python train_lookahead_posterior.py --config configs/lookahead_mnist16.py --config.pm_vae_dir=RUN
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.lookahead()
    config.dataset = "mnist16"
    config.evaluate_checkpoint = "best"
    config.batch_size = 32
    config.steps = 40_000
    config.validation_every = 5000
    return config
