"""PM-VAE on UCI Wine Quality, white (Cortez et al. 2009): 4,898 rows, 12 columns; an example of your own CSV file.

python train_pm_vae.py --config configs/pm_vae_whitewine.py --config.dataset=winequality-white.csv
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vae_tabular(latent_dim=12)
    config.dataset = "winequality-white.csv"
    config.model.partial_posterior = common.autoregressive_gmm(residual_blocks=2, hidden_units=128)
    config.noise_std = 0.1
    config.beta = {"name": "monotonic", "low": 0.0, "high": 1.0, "transition_begin": 200, "transition_steps": 1000}
    config.ema_decay = 0.995
    config.batch_size = 256
    config.steps = 3000
    config.validation_every = 500
    config.optimizer.transition_steps = 300
    config.optimizer.weight_decay = 1e-3
    return config
