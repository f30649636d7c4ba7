"""The default config of a table, and changes to it."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from posterior_matching.training.batching import default_batch_size


def table_config(num_rows: int = 1000, num_columns: int = 10) -> ConfigDict:
    """Returns the default config for a table with so many rows to train on, without `config.table`."""
    # Chosen by validation likelihood on titanic, heart disease and white wine, and by the imputation error on housing
    # and, for wide tables, digits, see docs/notes.md.
    wide = num_columns >= 30
    units = 128 if num_rows < 10_000 else 256
    steps = 4000 if num_rows < 2000 else 8000 if num_rows < 10_000 else 10_000
    encoder = {"name": "ResidualMLP", "residual_blocks": 2, "hidden_units": units, "layer_norm": False, "dropout": 0.0}
    return ConfigDict(
        {
            "seed": 0,
            "dataset": None,
            "train_split": "train",
            "validation_split": "validation",
            "batch_size": min(default_batch_size(num_rows), 128),  # each row with several z
            "steps": steps,
            "validation_every": 200,
            "log_every": 100,
            "patience": 10,
            "checkpoint_every": None,
            "evaluate_checkpoint": "best",
            "ema_decay": 0.99,
            "skip_nonfinite_updates": False,
            "data_memory_budget_gb": 8.0,
            "optimizer": {
                "learning_rate": 1e-3,
                "decay_rate": 0.9,
                "transition_steps": steps // 10,
                "staircase": False,
                "warmup_steps": 0,
                "weight_decay": 1e-3,
                "clip_norm": 10.0,
                "eps": 1e-8,
            },
            "noise_std": 0.03,
            "mask_generator": {"name": "BernoulliMaskGenerator", "p": 0.5},
            "matching_coef": 1.0,
            "matching_ll_stop_gradients": True,
            "elbo_samples": 8,
            "pretrained_dir": None,
            "beta": {
                "name": "monotonic",
                "low": 0.0,
                "high": 1.0,
                "transition_begin": 0,
                "transition_steps": 2500 if wide else 500,
            },
            "model": {
                "latent_dim": min(max(num_columns // 2, 2), 32),
                "encoder": encoder,
                "posterior": {"name": "TriLGaussian"},
                "decoder": encoder,
                "likelihood": {"name": "Columns", "num_components": 3, "shared_scales": wide},
                "availability": config_dict.placeholder(bool),  # found from the data
                "partial_encoder": encoder,
                "partial_posterior": {
                    "name": "AutoregressiveGMM",
                    "num_components": 10,
                    "residual_blocks": 1,
                    "hidden_units": 64,
                },
            },
        }
    )


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with changes to its keys; a group with another `name` replaces the old one."""
    result = dict(config)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("name") in (None, old.get("name")):
            value = changed(old, value)
        result[key] = value
    return result
