"""VaDE on MNIST (paper, section on partially observed clustering).

python train_vade.py --config configs/vade_mnist.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.vade()
    encoder_layers = ((32, 5, 1), (32, 5, 2), (64, 5, 1), (64, 5, 2), (128, 7, 1))
    decoder_layers = ((64, 7, 1), (64, 5, 2), (32, 5, 1), (32, 5, 2), (32, 5, 1), (1, 5, 1))
    config.dataset = "mnist"
    config.model = {
        "latent_dim": 10,
        "num_clusters": 10,
        "encoder": {"name": "ConvEncoder", "conv_layers": encoder_layers},
        "posterior": {"name": "DiagonalGaussian"},
        "decoder": {"name": "ConvDecoder", "conv_layers": decoder_layers, "activate_output": False},
        "likelihood": {"name": "Bernoulli"},
    }
    config.batch_size = 128
    epoch = 60_000 / 128  # steps
    config.pretraining.steps = round(150 * epoch)
    config.pretraining.optimizer.learning_rate = 2e-3
    config.pretraining.optimizer.decay_rate = 1.0
    config.steps = config.pretraining.steps + round(300 * epoch)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.transition_steps = round(10 * epoch)
    config.optimizer.staircase = True
    config.optimizer.eps = 1e-4
    config.validation_every = 2000
    return config
