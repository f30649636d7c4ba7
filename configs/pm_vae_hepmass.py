"""PM-VAE on `hepmass`: 21 features of particle collisions (paper, UCI experiments).

python train_pm_vae.py --config configs/pm_vae_hepmass.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vae_tabular(latent_dim=16)
    config.dataset = "hepmass"
    config.batch_size = 512
    config.steps = 200_000
    config.optimizer.transition_steps = 5000
    config.beta = common.cyclic_beta(period=50_000, delay=1000)
    return config
