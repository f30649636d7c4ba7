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
    cli.evaluation_main(
        files.impute,
        pm_vae_table.get_config(),
        run_dir="Use the run in this directory, made by a training script or with --train (required).",
        mask_generator="Draw the holes of images with this generator, given with its options as in "
        "SquareMaskGenerator:size=4; 'config' uses the generator the run was trained with.",
        batch_size="Fill this many rows or images at once; by default 128 rows or 8 images.",
        num_samples="Draw this many z for a point estimate, and for draws of rows to choose from; by default 256 for "
        "rows, 64 for images.",
        seed="Seed the imputations with this number.",
    )
