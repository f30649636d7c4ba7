"""Draws the loss of runs against the step, from their metrics.jsonl.

python figures/learning_curves.py runs/a runs/b ... --output figures/learning_curves.png
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from posterior_matching import runs
from posterior_matching.errors import UserError

_COLUMNS = 3


def read_losses(run_dir: str) -> dict[str, np.ndarray]:
    """Returns `step`, `train_loss` and `val_loss` of every validation of a run, `[V]` each.

    Raises:
        UserError: Not a run directory, or nothing was validated yet.
    """
    runs.read_description(run_dir)
    path = pathlib.Path(run_dir) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not rows:
        raise UserError(f"{run_dir} has no validation in metrics.jsonl yet: train it longer (config.validation_every)")
    # A validation at the end of a pretraining has no training loss beside it.
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in ("step", "train_loss", "val_loss")}


def draw(run_dirs: list[str], output: str) -> None:
    """Writes one picture with a panel for each run."""
    losses = [read_losses(run_dir) for run_dir in run_dirs]
    num_rows = -(-len(losses) // _COLUMNS)
    figure, axes = plt.subplots(num_rows, _COLUMNS, figsize=(9, 2.1 * num_rows), squeeze=False)
    for axis, run_dir, found in zip(axes.flat, run_dirs, losses, strict=False):
        axis.plot(found["step"], found["train_loss"], color="tab:grey", label="training")
        axis.plot(found["step"], found["val_loss"], color="tab:blue", label="validation")
        axis.set_title(pathlib.Path(run_dir).name, fontsize=8)
        axis.tick_params(labelsize=6)
        axis.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
    for axis in axes.flat[len(losses) :]:
        axis.set_axis_off()
    axes[0, 0].legend(fontsize=6)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("loss, nats", fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=100)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--output", default="learning_curves.png")
    arguments = parser.parse_args()
    try:
        draw(arguments.run_dirs, arguments.output)
    except (UserError, OSError, ValueError) as error:  # the latter two: OUTPUT cannot be written
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
