"""Draws the README's figure, which explains Posterior Matching with the images and latents of a trained run.

python figures/method.py --run_dir runs/demo --output figures/method.png
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import matplotlib
import numpy as np
from absl import flags

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from posterior_matching import cli
from posterior_matching.errors import UserError
from posterior_matching.evaluation.examples import open_run

_RUN_DIR = flags.DEFINE_string("run_dir", None, "run directory of train_pm_vae.py, on images", required=True)
_OUTPUT = flags.DEFINE_string("output", "method.png", "The file to write.")
_EXAMPLE = flags.DEFINE_integer("example", 2, "Index of the test image.")

_POSTERIOR, _PARTIAL = "tab:red", "tab:blue"


def draw(run_dir: str, example: int) -> plt.Figure:
    """Draws the figure for test image number `example` of a PM-VAE run on images."""
    run = open_run(run_dir, "pm_vae")
    model, dataset, x = run.model, run.dataset, run.x
    if len(dataset.input_shape) != 3:
        raise UserError(f"{run_dir} was not trained on images")
    if not 0 <= example < len(dataset):
        raise UserError(f"--example={example}: the test split has {len(dataset)} images")
    height, width, _ = dataset.input_shape
    b = np.zeros((1, height, width, 1), np.float32)
    b[:, : height // 2] = 1.0
    image = x[example : example + 1]

    key = jax.random.key(0)
    partial = np.asarray(model.partial_posterior(image, b).sample(key, (300,)))[:, 0]  # [S, e]
    posterior = np.asarray(model.vae.posterior(image).sample(key, (300,)))[:, 0]
    imputations = np.asarray(model.impute(image, b, 4, key=jax.random.key(1)))[:, 0]
    # The plane of greatest variance of the test set's latent codes.
    codes = np.asarray(model.vae.posterior(x).mean)
    plane = np.linalg.svd(codes - codes.mean(0), full_matrices=False)[2][:2].T

    figure = plt.figure(figsize=(9, 3.3))
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set(xlim=(0, 9), ylim=(0, 3.3))
    canvas.set_axis_off()

    def show(pixels: np.ndarray, left: float, bottom: float, size: float, title: str = "") -> None:
        axis = figure.add_axes((left / 9, bottom / 3.3, size / 9, size / 3.3))
        axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=9)

    def box(text: str, left: float, bottom: float, colour: str) -> None:
        canvas.add_patch(
            FancyBboxPatch((left, bottom), 1.15, 0.5, boxstyle="round,pad=0.05", facecolor="white", edgecolor=colour)
        )
        canvas.text(left + 0.575, bottom + 0.25, text, ha="center", va="center", fontsize=9)

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str = "black") -> None:
        canvas.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour))

    show(image[0], 0.25, 1.95, 1.0, "$x$")
    show(np.where(b[0] == 1, image[0], 0.5), 0.25, 0.3, 1.0, "$x_o$")
    box("encoder", 1.75, 2.2, _POSTERIOR)
    box("partial encoder", 1.75, 0.55, _PARTIAL)
    arrow((1.3, 2.45), (1.7, 2.45))
    arrow((1.3, 0.8), (1.7, 0.8))
    arrow((2.98, 2.45), (3.6, 2.1), _POSTERIOR)
    arrow((2.98, 0.8), (3.6, 1.15), _PARTIAL)

    latent = figure.add_axes((3.65 / 9, 0.55 / 3.3, 2.1 / 9, 2.1 / 3.3))
    latent.scatter((codes @ plane)[:, 0], (codes @ plane)[:, 1], s=3, color="lightgrey", linewidths=0)
    latent.scatter(
        (partial @ plane)[:, 0],
        (partial @ plane)[:, 1],
        s=5,
        color=_PARTIAL,
        linewidths=0,
        alpha=0.6,
        label="$q(z \\mid x_o)$",
    )
    latent.scatter(
        (posterior @ plane)[:, 0],
        (posterior @ plane)[:, 1],
        s=5,
        color=_POSTERIOR,
        linewidths=0,
        alpha=0.6,
        label="$q(z \\mid x)$",
    )
    latent.set(xticks=[], yticks=[])
    latent.set_title("latent space", fontsize=9)
    latent.legend(fontsize=7, loc="lower left", markerscale=2, handletextpad=0.1)
    canvas.text(
        4.7, 0.28, "Posterior Matching: raise $\\log q(z \\mid x_o)$\nat samples $z \\sim q(z \\mid x)$",
        ha="center", va="center", fontsize=9,
    )  # fmt: skip

    arrow((5.8, 1.6), (6.2, 1.6))
    box("decoder", 6.25, 1.35, "black")
    arrow((7.48, 1.6), (7.8, 1.6))
    for index, pixels in enumerate(imputations):
        show(pixels, 7.85, 2.33 - 0.73 * index, 0.65, "$x_u \\sim p(x_u \\mid x_o)$" if index == 0 else "")
    return figure


def main() -> None:
    """Draws the figure and writes it."""
    figure = draw(_RUN_DIR.value, _EXAMPLE.value)
    try:
        figure.savefig(_OUTPUT.value, dpi=150, facecolor="white")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --output={_OUTPUT.value}: {error}") from None
    print(f"written to {_OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
