"""PM-VAE on a table of your own, whatever its columns.

python train_pm_vae.py --config configs/pm_vae_table.py --config.dataset=mine.csv
"""

from ml_collections import ConfigDict, config_dict

from configs import common
from posterior_matching.impute.defaults import table_config


def get_config() -> ConfigDict:
    config = common.pm_vae()
    del config.beta  # of a schedule with other options
    config.update(table_config())
    config.batch_size = config_dict.placeholder(int)  # None: set by the number of rows
    return config
