"""PM-VAE on UCI Wine Quality, white (Cortez et al. 2009): 4,898 rows, 12 columns. An example of one's own CSV file.

python train_pm_vae.py --config configs/pm_vae_whitewine.py --config.dataset=winequality-white.csv
"""

from configs import common


def get_config():
    config = common.pm_vae_tabular(latent_dim=8, layer_norm=True, dropout=0.2)
    config.dataset = "winequality-white.csv"
    config.batch_size = 256
    config.steps = 3000
    config.validation_every = 250
    config.evaluate_checkpoint = "best"
    config.optimizer.transition_steps = 300
    return config
