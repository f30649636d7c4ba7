"""Evaluation of image imputations, for the PM-VQVAE and the PM-VDVAE (paper, image inpainting).

PSNR measures how close the mean imputation is to the truth; precision and recall of distributions measure how well
individual imputations match the distribution of real images.
"""

import dataclasses
import os
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from posterior_matching.config import Count, call, option
from posterior_matching.errors import UserError
from posterior_matching.evaluation import baselines as rivals
from posterior_matching.evaluation.embeddings import EMBEDDINGS
from posterior_matching.evaluation.examples import WEIGHTED, ExampleMap, MaskedOptions
from posterior_matching.evaluation.metrics import NUM_CLUSTERS, max_f_score, precision_recall, psnr
from posterior_matching.evaluation.results import Results, with_log
from posterior_matching.models.marginal_likelihood import tempered_weights, weighted_mean
from posterior_matching.models.vdvae import PosteriorMatchingVDVAE, UnitRange
from posterior_matching.models.vqvae import PosteriorMatchingVQVAE

MODELS = ("pm_vdvae", "pm_vqvae")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(MaskedOptions):
    """The options of this evaluation; each is a flag of its script."""

    run_dir: str | os.PathLike[str] = option(
        dataclasses.MISSING,
        "Evaluate the run in this directory, made by train_pm_vqvae.py or train_pm_vdvae.py (required).",
    )
    num_samples: Count = option(10, "Draw this many imputations of each image.")
    embedding: Literal["inception", "pixels", "none"] = option(
        "inception",
        "Compute precision and recall in this embedding of images, 'inception' (a download of 96 MB) or 'pixels'; or "
        "neither, with 'none', which saves most of the time.",
    )
    weighted: bool = option(False, WEIGHTED)
    baselines: bool = option(
        False, "Also compute the PSNR of mean and k-nearest-neighbour imputation on the same masks."
    )


def evaluate(run_dir: str | os.PathLike[str], **options: Any) -> Results:
    """Evaluates a PM-VQVAE or PM-VDVAE and writes `imputation_results/` in its run directory.

    The folder holds `psnrs.npy` [trials], `prd_data.npy` [trials, 2 (precision, recall), 1001], `f_scores.npy` [trials,
    2 (F_1/8, F_8)], `results.json` and `imputations.png`. The metrics `precision` and `recall` are the maximum F_1/8
    and F_8 along the curve, as in the paper; `f_1_8` and `f_8` are the same numbers under their exact names.

    Args:
        run_dir: The run directory.
        options: Fields of `Options`.

    Raises:
        UserError: An argument is wrong, or does not match the run.
    """
    chosen = call(Options, {"run_dir": run_dir} | options)
    run = chosen.open_run()
    embedding, weighted, num_samples = chosen.embedding, chosen.weighted, chosen.num_samples
    if (name := run.description["model"]) not in MODELS:
        raise UserError(f"{run_dir} is a run of {name}, not of {' or '.join(MODELS)}")
    if embedding != "none" and len(run.dataset) < NUM_CLUSTERS:
        raise UserError(
            f"precision and recall need at least {NUM_CLUSTERS} images, not {len(run.dataset)}: choose embedding=none"
        )
    generator = run.masks(chosen.mask_generator)
    embed = EMBEDDINGS[embedding]() if embedding != "none" else None
    trained: PosteriorMatchingVQVAE | PosteriorMatchingVDVAE = run.model
    model = UnitRange(trained) if isinstance(trained, PosteriorMatchingVDVAE) else trained

    def impute_example(models: nnx.Dict, key: jax.Array, x: jax.Array, available: jax.Array) -> dict[str, jax.Array]:
        key_mask, key_impute = jax.random.split(key)
        b = generator(key_mask, (1, *run.mask_shape)) * available[None]
        imputations, log_weights = models["model"].impute_and_weigh(x[None], b, num_samples, key=key_impute)
        mean = weighted_mean(imputations, tempered_weights(log_weights)) if weighted else imputations.mean(0)
        found = {"b": b[0], "imputation": mean[0]}
        return found if embed is None else found | {"embeddings": models["embed"](imputations[:, 0])}

    def embed_example(embed: nnx.Module, _key: jax.Array, x: jax.Array, _available: jax.Array) -> dict[str, jax.Array]:
        return {"embedding": embed(x[None])[0]}

    key = jax.random.key(chosen.seed)
    parts = {"model": model} | ({} if embed is None else {"embed": embed})
    impute_all = ExampleMap(impute_example, nnx.Dict(parts), run.dataset, chosen.batch_size)
    if embed is not None:
        real = ExampleMap(embed_example, embed, run.dataset, chosen.batch_size)(key, "embeddings")["embedding"]
    imputers = rivals.fit(run.training_rows(), ("mean", "knn")) if chosen.baselines else {}
    results = Results(run.path / "imputation_results", len(run.dataset), vars(chosen))
    curves = []

    for trial in with_log(range(chosen.num_trials), "trial"):
        found = impute_all(jax.random.fold_in(key, trial), f"trial {trial + 1}: imputations")
        results.add_mean(psnr_db=psnr(run.x, found["imputation"]))  # infinite for images imputed exactly
        for name, imputation in rivals.impute(imputers, run.x, found["b"]):
            results.add_mean(**{f"psnr_{name}_db": psnr(run.x, imputation)})
        if embed is None:
            continue
        sets = np.moveaxis(found["embeddings"], 1, 0)
        with tqdm(sets, f"trial {trial + 1}: precision and recall", leave=False, disable=None) as bar:
            precision, recall = np.mean([precision_recall(real, generated, chosen.seed) for generated in bar], axis=0)
        curves.append((precision, recall))
        f_1_8, f_8 = max_f_score(precision, recall, 1 / 8), max_f_score(precision, recall, 8)
        results.add(precision=f_1_8, recall=f_8, f_1_8=f_1_8, f_8=f_8)

    scores: dict[str, np.ndarray | None] = {"prd_data": None, "f_scores": None}
    if embed is not None:
        f_scores = np.stack([results.trials("f_1_8"), results.trials("f_8")], axis=1)
        scores = {"prd_data": np.array(curves), "f_scores": f_scores}
    results.write(psnrs=results.trials("psnr_db"), **scores)
    results.draw_imputations(model, run.x, generator)
    return results
