"""VaDE on a table of your own: rows in clusters.

python train_vade.py --config configs/vade_table.py --config.dataset=mine.csv --config.model.num_clusters=5
"""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config() -> ConfigDict:
    config = common.vade()
    network = common.residual_mlp(residual_blocks=1)
    config.model = {
        "latent_dim": 8,
        "num_clusters": 5,
        "encoder": network,
        "posterior": {"name": "DiagonalGaussian"},
        "decoder": network.copy_and_resolve_references(),
        "likelihood": {"name": "Columns"},
        "availability": config_dict.placeholder(bool),  # None: set by the data
    }
    config.noise_std = 0.1
    config.ema_decay = 0.99
    config.batch_size = config_dict.placeholder(int)  # None: set by the number of rows
    config.pretraining.steps = 1000
    config.pretraining.optimizer.weight_decay = 1e-3
    config.steps = config.pretraining.steps + 1000
    config.validation_every = 250
    config.optimizer.decay_rate = 0.1
    config.optimizer.transition_steps = 1000
    config.optimizer.weight_decay = 1e-3
    return config
