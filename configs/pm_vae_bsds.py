"""PM-VAE on `bsds`: 63-d patches of natural images (BSDS300) (paper, UCI experiments).

python train_pm_vae.py --config configs/pm_vae_bsds.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vae_tabular(latent_dim=64, encoder_blocks=5, decoder_blocks=5, layer_norm=True)
    config.dataset = "bsds"
    config.batch_size = 512
    config.steps = 200_000
    config.optimizer.transition_steps = 5000
    config.beta = {
        "name": "monotonic",
        "low": 0.0,
        "high": 1.0,
        "transition_begin": 30_000,
        "transition_steps": 200_000,  # the run ends at 0.85, as published
    }
    return config
