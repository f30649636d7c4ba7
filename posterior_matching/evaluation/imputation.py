"""The evaluation of image imputations that the PM-VQVAE and the PM-VDVAE share (paper, image inpainting).

How close the mean imputation is to the truth (PSNR), and how well several imputations, each on its own, cover the
distribution of real images (precision and recall of distributions).
"""

import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from flax import nnx

from posterior_matching import data, masking, runs
from posterior_matching.errors import UserError
from posterior_matching.evaluation import baselines, embeddings, metrics
from posterior_matching.evaluation.examples import ExampleMap, Results, load_dataset, rows, training_rows
from posterior_matching.evaluation.pictures import imputation_grid, save_png
from posterior_matching.progress import progress_bar

_RUN_DIR = flags.DEFINE_string("run_dir", None, "run directory of the training script", required=True)
_DATASET = flags.DEFINE_string("dataset", None, "Dataset; default: the one the run was trained on.")
_SPLIT = flags.DEFINE_string("split", "test", "Split of the dataset.")
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", None, ["best", "latest"], "Default: config.evaluate_checkpoint of the run."
)
_MASK = flags.DEFINE_string("mask_generator", "config", "Name of a mask generator, or 'config': the run's.")
_INSTANCES = flags.DEFINE_integer("num_instances", None, "Evaluate only the first examples; default: all.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Examples at once per device; no effect on results.", lower_bound=1
)
_SAMPLES = flags.DEFINE_integer("num_samples", 10, "Imputations of every image.", lower_bound=1)
_TRIALS = flags.DEFINE_integer("num_trials", 5, "Trials, each with fresh masks.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of masks, samples and clusterings.", lower_bound=0)
_EMBEDDING = flags.DEFINE_enum(
    "embedding", "inception", sorted(embeddings.EMBEDDINGS), "Of images, for precision and recall; pixels: no download."
)
_BASELINES = flags.DEFINE_bool("baselines", False, "Also the PSNR of mean and kNN imputation on the same masks.")

# (model, x [B, H, W, C] in [0, 1], b [B, H, W, 1], number of samples, key) -> [S, B, H, W, C] in [0, 1]
Impute = Callable[[nnx.Module, jax.Array, jax.Array, int, jax.Array], jax.Array]


def _impute(model, x, b, num_samples, key):
    return model.impute(x, b, num_samples, key=key)


def evaluate(model_name: str, impute: Impute = _impute) -> None:
    """Evaluates a run of `model_name` as the flags say, and writes `imputation_results/` in its run directory.

    Written are `psnrs.npy` [trials], `prd_data.npy` [trials, 2 (precision, recall), 1001], `f_scores.npy` [trials, 2
    (F_1/8, F_8)], `results.json` and `imputations.png`.
    """
    description = runs.read_description(_RUN_DIR.value, model_name)
    trained_on = masking.build_mask_generator(description["config"]["mask_generator"])
    named = {"name": _MASK.value}
    generator = trained_on if _MASK.value == "config" else masking.build_mask_generator(named, "--mask_generator")
    dataset = load_dataset(description, _DATASET.value, _SPLIT.value, _INSTANCES.value)
    mask_shape = masking.mask_shape(dataset.input_shape)
    generator.check(mask_shape)
    if len(dataset) < metrics.NUM_CLUSTERS:
        raise UserError(f"precision and recall need at least {metrics.NUM_CLUSTERS} images, not {len(dataset)}")
    embed = embeddings.EMBEDDINGS[_EMBEDDING.value]()
    model = runs.load_model(_RUN_DIR.value, model_name, _CHECKPOINT.value)

    def impute_example(models, key, x, available):
        key_mask, key_impute = jax.random.split(key)
        b = generator(key_mask, (1, *mask_shape)) * available[None]
        imputations = impute(models["model"], x[None], b, _SAMPLES.value, key_impute)[:, 0]
        return {"b": b[0], "imputation": imputations.mean(0), "embeddings": models["embed"](imputations)}

    def embed_example(embed, _key, x, _available):
        return {"embedding": embed(x[None])[0]}

    key = jax.random.key(_SEED.value)
    real = ExampleMap(embed_example, embed, dataset, _BATCH_SIZE.value)(key, "embeddings")["embedding"]
    impute_all = ExampleMap(impute_example, nnx.Dict(model=model, embed=embed), dataset, _BATCH_SIZE.value)
    x = np.asarray(data.decode(dataset.x, dataset.max_value)[0])
    results = Results(pathlib.Path(_RUN_DIR.value) / "imputation_results", len(dataset), _SEED.value)
    rivals = baselines.fit(training_rows(description), ("mean", "knn")) if _BASELINES.value else {}
    curves = []

    for trial in range(_TRIALS.value):
        found = impute_all(jax.random.fold_in(key, trial), f"trial {trial + 1}: imputations")
        psnr_db, exact = metrics.finite_mean(metrics.psnr(x, found["imputation"]))
        results.add(psnr_db=psnr_db)
        if exact:
            print(f"warning: {exact} images imputed exactly, with infinite PSNR, were left out of the mean of psnr_db")
        for name, imputer in rivals.items():
            filled = imputer(np.where(rows(np.broadcast_to(found["b"], x.shape)) == 1, rows(x), np.nan))
            results.add(**{f"psnr_{name}_db": metrics.finite_mean(metrics.psnr(x, filled.reshape(x.shape)))[0]})
        sets = progress_bar(np.moveaxis(found["embeddings"], 1, 0), f"trial {trial + 1}: precision and recall")
        curve = [metrics.precision_recall(real, generated, _SEED.value) for generated in sets]
        precision, recall = np.mean(curve, axis=0)  # over imputation sets
        curves.append((precision, recall))
        results.add(
            precision=metrics.max_f_score(precision, recall, 1 / 8), recall=metrics.max_f_score(precision, recall, 8)
        )

    f_scores = np.stack([results.trials("precision"), results.trials("recall")], axis=1)
    results.write(psnrs=results.trials("psnr_db"), prd_data=np.array(curves), f_scores=f_scores)
    path = results.folder / "imputations.png"
    shown = x[:10]
    key_mask, key_impute = jax.random.split(key)
    b = generator(key_mask, (len(shown), *mask_shape))
    draws = nnx.jit(functools.partial(impute, num_samples=6, key=key_impute))(model, shown, b)
    save_png(path, imputation_grid(shown, b, draws))
    print(f"original, observed part, six imputations: {path}")
