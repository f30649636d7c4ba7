"""PM-VAE on `miniboone`: 43 features of neutrino events (paper, UCI experiments).

python train_pm_vae.py --config configs/pm_vae_miniboone.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vae_tabular(latent_dim=32, encoder_blocks=5, decoder_blocks=2, layer_norm=True, dropout=0.5)
    config.dataset = "miniboone"
    config.batch_size = 1024
    config.steps = 22_000
    config.optimizer.transition_steps = 1000
    config.beta = common.cyclic_beta(period=5000, delay=2000)
    return config
