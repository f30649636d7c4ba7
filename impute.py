"""Fills the missing cells of a file of rows with a PM-VAE that was trained on a table with the same columns.

    python impute.py --run_dir runs/mine --input mine.csv --output filled.csv --train
    python impute.py --run_dir runs/mine --input new.csv --output new_filled.csv --num_imputations 5

All other cells are unchanged.
"""

from configs import pm_vae_table
from posterior_matching import cli, estimator

if __name__ == "__main__":
    cli.evaluation_main(
        estimator.impute,
        pm_vae_table.get_config(),
        run_dir="Use the run in this directory, made by train_pm_vae.py or with --train (required).",
        batch_size="Fill this many rows at once.",
        num_samples="Average this many draws of z for a point estimate.",
        seed="Seed the imputations with this number.",
    )
