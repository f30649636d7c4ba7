"""PM-VAE on UCI Adult: 6 real and 8 categorical columns, prepared as for the published results of ACE and DEformer.

python train_pm_vae.py --config configs/pm_vae_adult.py
"""

from ml_collections import ConfigDict

from configs import common
from posterior_matching.impute.defaults import table_config


def get_config() -> ConfigDict:
    config = common.pm_vae()
    del config.beta  # of a schedule with other options
    config.update(table_config(num_rows=22_004, num_columns=14))
    config.dataset = "adult"
    # Most real columns repeat a few values, such as no capital gain: sharp components, each at one of them.
    config.noise_std = 0.0
    config.elbo_samples = 1
    config.batch_size = 256
    config.model.likelihood.update({"num_components": 10, "spread": True})
    config.steps = 20_000
    config.optimizer.transition_steps = 2000
    config.patience = 30
    config.model.availability = False  # no values are missing
    return config
