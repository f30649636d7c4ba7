"""Plots the losses of runs against the step, from their metrics.jsonl.

python figures/learning_curves.py --run_dir runs/a --run_dir runs/b --output figures/learning_curves.png
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from posterior_matching import cli, runs
from posterior_matching.errors import UserError

_RUN_DIRS = flags.DEFINE_multi_string("run_dir", None, "a run directory; give it once for each run", required=True)
_OUTPUT = flags.DEFINE_string("output", "learning_curves.png", "The file to write.")

_COLUMNS = 3


def read_losses(run_dir: str) -> dict[str, np.ndarray]:
    """Returns `step`, `train_loss` and `val_loss` of every validation of a run, `[V]` each.

    Raises:
        UserError: It is not a run directory, or has no validation yet.
    """
    runs.read_description(run_dir)
    path = pathlib.Path(run_dir) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not rows:
        raise UserError(f"{run_dir} has no validation in metrics.jsonl yet: train it longer (config.validation_every)")
    # The validation at the end of pretraining has no training loss.
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in ("step", "train_loss", "val_loss")}


def draw(run_dirs: list[str]) -> plt.Figure:
    """Draws a figure with one panel per run."""
    losses = [read_losses(run_dir) for run_dir in run_dirs]
    num_rows = -(-len(losses) // _COLUMNS)
    figure, axes = plt.subplots(num_rows, _COLUMNS, figsize=(9, 2.1 * num_rows), squeeze=False)
    for axis, run_dir, curves in zip(axes.flat, run_dirs, losses, strict=False):
        axis.plot(curves["step"], curves["train_loss"], color="tab:grey", label="training")
        axis.plot(curves["step"], curves["val_loss"], color="tab:blue", label="validation")
        axis.set_title(pathlib.Path(run_dir).name, fontsize=8)
        axis.tick_params(labelsize=6)
        axis.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        axis.xaxis.get_offset_text().set_fontsize(6)
    for axis in axes.flat[len(losses) :]:
        axis.set_axis_off()
    axes[0, 0].legend(fontsize=6)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("loss, nats", fontsize=8)
    figure.tight_layout()
    return figure


def main() -> None:
    """Draws the figure and writes it."""
    figure = draw(_RUN_DIRS.value)
    try:
        figure.savefig(_OUTPUT.value, dpi=100)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --output={_OUTPUT.value}: {error}") from None
    print(f"written to {_OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
