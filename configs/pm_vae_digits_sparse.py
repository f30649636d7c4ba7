"""PM-VAE on scikit-learn's 8x8 digits with few observed pixels: the base of `lookahead_digits`.

    python train_pm_vae.py --config configs/pm_vae_digits_sparse.py

Like `pm_vae_mnist16`, it has masks that start from nothing observed, as acquisition does, and a Gaussian q(z | x_o),
whose entropy is in closed form, so that sampling-based gains are exact up to the sampled imputations.
"""

from ml_collections import ConfigDict

from configs import pm_vae_digits


def get_config() -> ConfigDict:
    config = pm_vae_digits.get_config()
    config.model.partial_posterior = {"name": "TriLGaussian"}
    config.mask_generator = {"name": "UniformMaskGenerator", "bounds": (0.0, 0.5)}
    config.steps = 3000
    return config
