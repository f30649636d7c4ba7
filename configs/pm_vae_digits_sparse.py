"""PM-VAE on scikit-learn's 8x8 digits with few observed pixels, the base of `lookahead_digits`.

    python train_pm_vae.py --config configs/pm_vae_digits_sparse.py

As `pm_vae_mnist16` differs from `pm_vae_mnist`: masks that begin at none observed, as acquisition does, and a Gaussian
q(z | x_o), whose entropy has a closed form; sampling-based gains are then exact but for the imputations.
"""

from configs import pm_vae_digits


def get_config():
    config = pm_vae_digits.get_config()
    config.model.partial_posterior = {"name": "TriLGaussian"}
    config.mask_generator = {"name": "UniformMaskGenerator", "bounds": (0.0, 0.5)}
    config.steps = 3000
    return config
