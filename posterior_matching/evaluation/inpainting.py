"""Evaluation of image imputations, for the PM-VQVAE and the PM-VDVAE (paper, image inpainting).

PSNR measures how close the mean imputation is to the truth; precision and recall of distributions measure how well
individual imputations match the distribution of real images.
"""

import os
from typing import Literal

import jax
import numpy as np
from flax import nnx

from posterior_matching.config import Count, Seed, check
from posterior_matching.errors import UserError
from posterior_matching.evaluation import baselines as rivals
from posterior_matching.evaluation.embeddings import EMBEDDINGS
from posterior_matching.evaluation.examples import Checkpoint, ExampleMap, open_run
from posterior_matching.evaluation.metrics import NUM_CLUSTERS, max_f_score, precision_recall, psnr
from posterior_matching.evaluation.results import Results
from posterior_matching.mask_generators import MaskGenerator
from posterior_matching.models.marginal_likelihood import tempered_weights, weighted_mean
from posterior_matching.models.vdvae import PosteriorMatchingVDVAE, UnitRange
from posterior_matching.models.vqvae import PosteriorMatchingVQVAE
from posterior_matching.progress import progress_bar, with_log

MODELS = ("pm_vdvae", "pm_vqvae")


def evaluate(
    run_dir: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    split: str = "test",
    checkpoint: Checkpoint | None = None,
    mask_generator: str | MaskGenerator = "config",
    num_instances: Count | None = None,
    batch_size: Count = 32,
    num_samples: Count = 10,
    num_trials: Count = 5,
    seed: Seed = 0,
    embedding: Literal["inception", "pixels", "none"] = "inception",
    weighted: bool = False,
    baselines: bool = False,
) -> Results:
    """Evaluates a PM-VQVAE or PM-VDVAE and writes `imputation_results/` in its run directory.

    The folder holds `psnrs.npy` [trials], `prd_data.npy` [trials, 2 (precision, recall), 1001], `f_scores.npy` [trials,
    2 (F_1/8, F_8)], `results.json` and `imputations.png`. The metrics `precision` and `recall` are the maximum F_1/8
    and F_8 along the curve, as in the paper; `f_1_8` and `f_8` are the same numbers under their exact names.

    Args:
        run_dir: The run directory.
        dataset: The dataset; None: the one the run was trained on.
        split: Its split.
        checkpoint: "best" or "latest"; None: the one named in the run's config.
        mask_generator: The generator of the masks, see `Evaluation.masks`.
        num_instances: Evaluate only this many images, from the first; None: all.
        batch_size: Images at once on each device.
        num_samples: Imputations of every image.
        num_trials: Trials, each with its own masks.
        seed: Random seed of masks, samples and clusterings.
        embedding: The embedding for precision and recall, a key of `EMBEDDINGS`; "none" leaves both out, which saves
            most of the time when there are many imputations of each image.
        weighted: Weigh the imputations of the mean, see `likelihood.tempered_weights`; as published, they are not.
        baselines: Also compute the PSNR of mean and kNN imputation on the same masks.

    Raises:
        UserError: An argument is wrong, or does not match the run.
    """
    arguments = check(evaluate, dict(locals()))
    run = open_run(run_dir, dataset=dataset, split=split, checkpoint=checkpoint, num_instances=num_instances)
    if (name := run.description["model"]) not in MODELS:
        raise UserError(f"{run_dir} is a run of {name}, not of {' or '.join(MODELS)}")
    if embedding != "none" and len(run.dataset) < NUM_CLUSTERS:
        raise UserError(
            f"precision and recall need at least {NUM_CLUSTERS} images, not {len(run.dataset)}: choose embedding=none"
        )
    generator = run.masks(mask_generator)
    embed = EMBEDDINGS[embedding]() if embedding != "none" else None
    trained: PosteriorMatchingVQVAE | PosteriorMatchingVDVAE = run.model
    model = UnitRange(trained) if isinstance(trained, PosteriorMatchingVDVAE) else trained

    def impute_example(models: nnx.Dict, key: jax.Array, x: jax.Array, available: jax.Array):
        key_mask, key_impute = jax.random.split(key)
        b = generator(key_mask, (1, *run.mask_shape)) * available[None]
        imputations, log_weights = models["model"].impute_and_weigh(x[None], b, num_samples, key=key_impute)
        mean = weighted_mean(imputations, tempered_weights(log_weights)) if weighted else imputations.mean(0)
        found = {"b": b[0], "imputation": mean[0]}
        return found if embed is None else found | {"embeddings": models["embed"](imputations[:, 0])}

    def embed_example(embed: nnx.Module, _key: jax.Array, x: jax.Array, _available: jax.Array):
        return {"embedding": embed(x[None])[0]}

    key = jax.random.key(seed)
    parts = {"model": model} | ({} if embed is None else {"embed": embed})
    impute_all = ExampleMap(impute_example, nnx.Dict(parts), run.dataset, batch_size)
    if embed is not None:
        real = ExampleMap(embed_example, embed, run.dataset, batch_size)(key, "embeddings")["embedding"]
    imputers = rivals.fit(run.training_rows(), ("mean", "knn")) if baselines else {}
    results = Results(run.path / "imputation_results", len(run.dataset), arguments)
    curves = []

    for trial in with_log(range(num_trials), "trial"):
        found = impute_all(jax.random.fold_in(key, trial), f"trial {trial + 1}: imputations")
        results.add_mean(psnr_db=psnr(run.x, found["imputation"]))  # infinite for images imputed exactly
        for name, imputation in rivals.impute(imputers, run.x, found["b"]):
            results.add_mean(**{f"psnr_{name}_db": psnr(run.x, imputation)})
        if embed is None:
            continue
        sets = np.moveaxis(found["embeddings"], 1, 0)
        with progress_bar(sets, f"trial {trial + 1}: precision and recall", leave=False) as bar:
            precision, recall = np.mean([precision_recall(real, generated, seed) for generated in bar], axis=0)
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
