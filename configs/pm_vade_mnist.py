"""PM-VaDE on MNIST (paper, section on partially observed clustering).

python train_pm_vade.py --config configs/pm_vade_mnist.py --config.vade_dir=RUN
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vade()
    config.model = {
        "partial_encoder": None,  # the VaDE encoder's, with its own weights
        "partial_posterior": common.autoregressive_gmm(residual_blocks=2),
    }
    config.dataset = "mnist"
    config.batch_size = 128
    config.steps = 160_000
    config.validation_every = 2000
    config.optimizer.transition_steps = round(10 * 60_000 / 128)  # 10 epochs
    return config
