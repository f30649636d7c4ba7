"""PM-VaDE on `vade_table`: the clusters of rows with holes.

python train_pm_vade.py --config configs/pm_vade_table.py --config.vade_dir=RUN
"""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vade()
    config.model = {
        "partial_encoder": None,  # the VaDE encoder's, with its own weights
        "partial_posterior": common.autoregressive_gmm(residual_blocks=1, hidden_units=64),
    }
    config.noise_std = 0.05
    config.ema_decay = 0.99
    config.batch_size = config_dict.placeholder(int)  # None: set by the number of rows
    config.steps = 1500
    config.validation_every = 250
    config.evaluate_checkpoint = "best"
    config.optimizer.transition_steps = 150
    return config
