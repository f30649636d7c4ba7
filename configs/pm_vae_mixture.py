"""PM-VAE on samples from a known Gaussian mixture; the evaluation also prints the exact likelihood.

python train_pm_vae.py --config configs/pm_vae_mixture.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vae_tabular(latent_dim=8)
    config.dataset = "mixture"
    config.model.partial_posterior = common.autoregressive_gmm(residual_blocks=2, hidden_units=128)
    config.steps = 6000
    config.validation_every = 1000
    config.optimizer.transition_steps = 400
    return config
