"""PM-VAE on UCI Adult: 6 real and 8 categorical columns, prepared as for the published results of ACE and DEformer.

python train_pm_vae.py --config configs/pm_vae_adult.py
"""

from configs import common
from posterior_matching.estimator import table_config


def get_config():
    config = common.pm_vae()
    del config.beta  # of a schedule with other options
    config.update(table_config(num_rows=22_004, num_columns=14))
    config.dataset = "adult"
    config.noise_std = 0.001
    config.model.likelihood.num_components = 10
    config.model.availability = False  # no values are missing
    return config
