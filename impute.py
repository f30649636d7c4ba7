"""Fills the missing cells of a table with a PM-VAE that was trained on the same columns, or the holes of images.

    python impute.py --run_dir runs/mine --input mine.csv --output filled.csv --train
    python impute.py --run_dir runs/mine --input new.csv --output new_filled.csv --num_imputations 5
    python impute.py --run_dir runs/photos --input photos --output filled --mask mask.png

All other cells and pixels are unchanged.
"""

from configs import pm_vae_table
from posterior_matching import cli
from posterior_matching.impute import files

if __name__ == "__main__":
    cli.evaluation_main(files.impute, files.Options, pm_vae_table.get_config())
