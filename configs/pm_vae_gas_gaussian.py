"""PM-VAE on `gas` with a Gaussian q(z | x_o), which the published code trains instead of the intended mixture.

python train_pm_vae.py --config configs/pm_vae_gas_gaussian.py
"""

from ml_collections import ConfigDict

from configs import pm_vae_gas


def get_config() -> ConfigDict:
    config = pm_vae_gas.get_config()
    config.model.partial_posterior = {"name": "TriLGaussian"}
    return config
