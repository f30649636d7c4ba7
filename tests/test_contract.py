"""What every family promises, tested for all of them: the paper's claims, and what users rely on."""

import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import synthetic
from helpers.arrays import by_path, randomised
from helpers.configs import FAMILIES, GMM, MLP, ROOT, small, untrained
from helpers.runs import assert_same_runs, crash_after, refusal, rows, weights
from posterior_matching import data, models, parallel, runs
from posterior_matching.config import plain
from posterior_matching.masking import mask_shape
from posterior_matching.training.experiment import Batch

each_family = pytest.mark.parametrize("name", sorted(FAMILIES))

KEY = jax.random.key(0)


# Nothing conditional depends on unobserved values --------------------------------------------------------------------

SHAPES = {  # by config; of others, images of one channel
    "pm_vae": [(8, 8, 1)],
    "pm_vae_mixture": [(5,), (4, 4, 3)],
    "pm_vade": [(8, 8, 1), (5,)],
    "lookahead": [(8, 8, 1)],
    "pm_vdvae": [(8, 8, 1), (8, 8, 3)],
}
CONDITIONAL = [name for name, model in models.MODELS.items() if hasattr(model, "impute") or name == "lookahead"]
CASES = [(name, shape) for name in [*CONDITIONAL, "pm_vae_mixture"] for shape in SHAPES.get(name, [(8, 8, 1)])]


def model_config(name):
    """The small `config.model` of a family, or of a config of a PM-VAE, with that of its base."""
    config, base = plain(small(name).model), name in FAMILIES and FAMILIES[name].base
    return config | ({base.part: model_config(base.model)} if base and base.required else {})


@functools.cache
def random_model(name, shape):
    """A model, and examples with about half observed."""
    family = name if name in FAMILIES else "pm_vae"
    model = randomised(nnx.eval_shape(lambda: models.build(family, model_config(name), shape, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    x, b = rng.uniform(size=(4, *shape)), rng.integers(0, 2, (4, *mask_shape(shape)))
    return model, jnp.float32(x), jnp.float32(b)


def conditional_outputs(model, x, b):
    """Everything that a model says about x_o alone, by name; `[..., 4, ...]` each."""
    x = model.to_levels(x) if hasattr(model, "to_levels") else x
    outputs = {}
    if hasattr(model, "impute"):
        outputs["imputations"] = model.impute(x, b, 2, key=KEY)
    if hasattr(model, "is_log_prob"):
        scores = model.is_log_prob(x, b, 3, key=KEY)
        outputs |= {"log p(x_o)": scores.log_p_xo, "effective sample size": scores.ess_xo}
    if hasattr(model, "partial_posterior"):
        q = model.partial_posterior(x, b)
        z = q.sample(KEY, (2,))
        outputs |= {"z ~ q(z | x_o)": z, "log q(z | x_o)": q.log_prob(jax.lax.stop_gradient(z))}
    if hasattr(model, "conditional_input"):
        outputs["condition"] = model.conditional_input(x, b)
    if hasattr(model, "partial_cluster_probs"):
        outputs["clusters"] = model.partial_cluster_probs(x, b, 3, key=KEY)
    if hasattr(model, "info_gains"):
        gains = model.info_gains(x, b, 4, key=KEY)
        outputs["information gains"] = jnp.where(jnp.isfinite(gains), gains, 0.0)
    return outputs


@pytest.mark.parametrize("name, shape", CASES)
def test_unobserved_values_have_no_influence_at_all_and_observed_ones_are_copied(name, shape):
    """Exactly zero derivatives, by every output in a random direction, and no change when values are replaced."""
    model, x, b = random_model(name, shape)
    hidden = np.broadcast_to(np.asarray(b) == 0, x.shape)
    rng = np.random.default_rng(1)

    @jax.jit
    def run(x):
        outputs, pullback = jax.vjp(lambda x: conditional_outputs(model, x, b), x)
        directions = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), outputs)
        return outputs, pullback(directions)[0]

    outputs, gradient = run(x)
    assert outputs
    np.testing.assert_array_equal(np.asarray(gradient)[hidden], 0.0)
    for replacement in (0.0, 1.0 - x, 1e3):
        for key, value in run(jnp.where(hidden, replacement, x))[0].items():
            np.testing.assert_array_equal(value, outputs[key], err_msg=key)
    changed, _ = run(jnp.where(hidden, x, 1.0 - x))
    for key, value in changed.items():  # the test sees influence where there is some
        assert (np.asarray(value) != np.asarray(outputs[key])).any(), key
    if "imputations" in outputs:
        imputations = np.asarray(outputs["imputations"])
        copied = np.asarray(model.to_levels(x) if hasattr(model, "to_levels") else x)
        assert imputations.shape == (2, *x.shape) and (imputations[0] != imputations[1])[hidden].any()
        for imputation in imputations:
            np.testing.assert_array_equal(imputation[~hidden], copied[~hidden])


# What sees x_o is like what sees x -----------------------------------------------------------------------------------

DEEPER = MLP | {"residual_blocks": 1}
WITH_MASK, WITH_MASKS = {"layers.0.kernel": ((3, 3, 1, 4), (3, 3, 2, 4))}, {"linear_in.kernel": ((64, 8), (128, 8))}
TWINS = {  # by option: where they are, how the shapes of their weights differ, another value of the option
    "pm_vae partial_encoder": ("vae.encoder", "partial_posterior.encoder", WITH_MASK, MLP),
    "pm_vae partial_posterior": ("vae.posterior_head", "partial_posterior.head", {}, GMM),
    "pm_vade partial_encoder": ("vade.encoder", "partial_posterior.encoder", WITH_MASKS, DEEPER),
    "lookahead lookahead_encoder": ("pm_vae.vae.encoder", "encoder", WITH_MASK, MLP),
}


@pytest.mark.parametrize("case", TWINS)
def test_what_sees_x_o_is_by_default_like_what_sees_x_with_weights_of_its_own(case):
    (name, option), (of_x, of_x_o, difference, another) = case.split(), TWINS[case]
    config = {key: value for key, value in model_config(name).items() if key != option}

    def shapes(part, **given):
        model = nnx.eval_shape(lambda: models.build(name, config | given, (8, 8, 1), nnx.Rngs(0)))
        weights = {
            jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
        }
        return {key.removeprefix(f"{part}."): shape for key, shape in weights.items() if key.startswith(f"{part}.")}

    theirs, ours = shapes(of_x), shapes(of_x_o)
    assert theirs.keys() == ours.keys() != set()  # shared weights would have one path
    assert {key: (theirs[key], ours[key]) for key in theirs if theirs[key] != ours[key]} == difference
    assert shapes(of_x_o, **{option: None}) == ours
    assert shapes(of_x_o, **{option: another}).keys() != ours.keys()


# The matching loss sends no gradient where it must not ---------------------------------------------------------------

MATCHING = {"matching_ll_nats", "pm_kl_nats", "lookahead_ll_nats"}


def is_partial(family, path):
    """Whether a parameter belongs to what sees x_o only."""
    if family.base and family.base.required:
        return not path.startswith(f"{family.base.part}.")
    return "partial" in path


@each_family
def test_gradients_of_the_matching_term_and_of_the_others_reach_different_parameters(name):
    family, dataset = FAMILIES[name], synthetic.dataset("digits", 16)
    phase = untrained(name, small(name), dataset).phases[-1]
    graphdef, params, rest = nnx.split(randomised(phase.model), nnx.Param, ...)
    x, available = data.decode(dataset.x, dataset.max_value)

    @jax.jit
    def gradients(params):
        def terms(params):
            def loss(x, available):
                model = nnx.merge(graphdef, params, rest, copy=True)
                rngs = nnx.Rngs(noise=1, mask=2, sample=3, dropout=4)
                return phase.loss(model, Batch(x, available, None, jnp.int32(0)), rngs)

            values = jax.vmap(loss, axis_name=parallel.AXIS)(x[None], available[None])  # as on one device
            return {key: value.mean() for key, value in values.items()}

        return jax.jacrev(terms)(params)

    reached = {
        term: {path.removesuffix(".value") for path, value in by_path(state).items() if (value != 0).any()}
        for term, state in gradients(params).items()
    }
    trainable = {path.removesuffix(".value") for path in by_path(nnx.state(phase.model, phase.trainable))}
    partial = {path for path in trainable if is_partial(family, path)}
    assert reached["loss"] >= trainable
    for term in reached.keys() - {"loss"}:
        assert term not in MATCHING or reached[term] == partial, term
        assert term in MATCHING or not reached[term] & partial, term
    assert bool(partial) == bool(MATCHING & reached.keys())


# Runs ----------------------------------------------------------------------------------------------------------------

ON_A_BASE = [name for name, family in FAMILIES.items() if family.base and family.base.required]
OWN_PRETRAINED = "pm_vae on pm_vae"  # a base that the family does not need
RUNS = [*sorted(FAMILIES), OWN_PRETRAINED]


def without_pictures(family):
    """The family without its pictures, which take longest to compile; test_readme.py draws them all."""
    return dataclasses.replace(family, pictures=None)


class Runs:
    """Small runs on digits, trained when they are first asked for; their bases are gone then."""

    def __init__(self, folder):
        self._folder, self._done = folder, {}

    def config(self, case, **changes):
        name = case.split(" on ")[0]
        base = FAMILIES[name].base
        if base and (base.required or " on " in case):
            changes = {base.dir_key: str(self._folder / f"base of {case}"), "dataset": None} | changes
        return small(name, checkpoint_every=2, **changes)

    def __call__(self, case):
        if case not in self._done:
            family, config = without_pictures(FAMILIES[case.split(" on ")[0]]), self.config(case)
            base_dir = family.base and config[family.base.dir_key]
            if base_dir:
                shutil.copytree(self(family.base.model).path, base_dir)
            before = config.to_dict()
            path = family.train(config, str(self._folder / case))
            if base_dir:
                shutil.rmtree(base_dir)
            self._done[case] = SimpleNamespace(family=family, path=path, given=before, config=config)
        return self._done[case]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


each_run = pytest.mark.parametrize("case", RUNS)


@pytest.mark.slow
@each_run
def test_the_config_is_left_alone_and_saved_as_it_was_resolved(trained, case):
    run = trained(case)
    assert run.config.to_dict() == run.given
    resolved, saved = json.loads(json.dumps(plain(run.given))), runs.read_description(run.path, run.family.name)
    if run.given["dataset"] is None:
        base = runs.read_description(trained(run.family.base.model).path)["config"]
        keys = run.family.base.config_keys
        added = (
            {key: base["model"][key] for key in keys if key in base["model"]}
            if keys
            else {run.family.base.part: base["model"]}
        )
        resolved |= {"dataset": "digits", "model": resolved["model"] | added}
    assert saved["config"] == resolved and saved["input_shape"] == [8, 8, 1]


@pytest.mark.slow
@each_run
def test_losses_are_the_recorded_ones(trained, case, request):
    """Loss terms of the first steps; `pytest tests/test_contract.py -k recorded --record` writes them."""
    path = ROOT / "tests" / "goldens" / f"{case.replace(' ', '_')}.json"
    found = {
        f"step {row.pop('step')}": {key: float(f"{v:.6g}") for key, v in row.items()}
        for row in rows(trained(case).path)
    }
    if request.config.getoption("--record"):
        path.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(path.read_text())
    assert found.keys() == expected.keys()
    for step, row in found.items():
        assert row == pytest.approx(expected[step], rel=1e-3, abs=1e-3), step


@pytest.mark.slow
@each_run
def test_trained_weights_move_and_those_of_the_base_do_not(trained, case):
    run = trained(case)
    description = runs.read_description(run.path)
    after, base = weights(run.path), run.family.base
    start = models.build(run.family.name, plain(description["config"]["model"]), (8, 8, 1), nnx.Rngs(0))
    frozen = f"{base.part}." if base and (base.required or " on " in case) else None
    for key, before in weights(start).items():
        if frozen and key.startswith(frozen):
            original = weights(trained(base.model).path)
            np.testing.assert_array_equal(after[key], original[key if key in original else key.removeprefix(frozen)])
        else:
            assert (after[key] != before).any(), key


@pytest.mark.slow
@each_run
def test_stopped_and_resumed_without_its_base_a_run_is_as_if_never_stopped(trained, case, tmp_path):
    """It crashes between two checkpoints."""
    whole = trained(case)
    config, run_dir, base = trained.config(case), str(tmp_path / "run"), whole.family.base
    base_dir = base and config[base.dir_key]
    if base_dir:
        shutil.copytree(trained(base.model).path, base_dir)
    with crash_after(5):
        whole.family.train(config, run_dir)
    assert runs.latest_step(run_dir) == 4
    if base_dir:
        shutil.rmtree(base_dir)
    whole.family.train(config, run_dir)
    assert_same_runs(run_dir, whole.path)
    assert rows(run_dir)[-1]["step"] == 6


# Bad input gets one line ---------------------------------------------------------------------------------------------

BAD = {
    "unknown key": ({"stepz": 3}, "unknown key 'config.stepz': did you mean 'steps'?"),
    "unknown group": ({"optimiser": {"eps": 1.0}}, "unknown key 'config.optimiser': did you mean 'optimizer'?"),
    "unknown model key": ({"model__hiden_units": 3}, "unknown key 'config.model.hiden_units': "),
    "unknown optimiser key": ({"optimizer__learning_rat": 3}, "unknown key 'config.optimizer.learning_rat': did you"),
    "wrong type": ({"steps": "many"}, "config.steps must be "),
    "wrong type in a group": ({"optimizer__eps": None}, "config.optimizer.eps must be "),
    "a value for a group": ({"model": 3}, "config.model "),
    "out of range": ({"batch_size": 0}, "config.batch_size must be "),
    "out of range in a group": ({"optimizer__learning_rate": -1.0}, "config.optimizer.learning_rate must be "),
    "too many examples": ({"batch_size": 91}, "the 360 training examples: set config.batch_size to at most 90"),
    "unknown dataset": ({"dataset": "digit"}, "unknown dataset 'digit'"),
    "unknown split": ({"train_split": "tset"}, "tset"),
    "wrong shape": ({"dataset": "mixture", "train_split": "test"}, "(8,)"),
    "unknown mask generator": (
        {"mask_generator": {"name": "BernouliMaskGenerator"}},
        "unknown config.mask_generator.name 'BernouliMaskGenerator': did you mean 'BernoulliMaskGenerator'?",
    ),
    "mask generator for other shapes": ({"mask_generator": {"name": "CelebAMaskGenerator"}}, "CelebAMaskGenerator"),
}


@pytest.mark.parametrize("kind", BAD)
@each_family
def test_bad_input_gets_one_line_and_nothing_is_written(trained, name, kind, tmp_path):
    (changes, expected), config = BAD[kind], small(name)
    if "mask_generator" in changes and "mask_generator" not in config:
        expected = "unknown key 'config.mask_generator'"
    family, changes = FAMILIES[name], dict(changes)
    if family.base and family.base.required:
        changes[family.base.dir_key] = trained(family.base.model).path
    if kind == "wrong shape" and "mask_generator" in config:  # for families of tables, too
        changes["mask_generator"] = {"name": "MNISTMaskGenerator", "dim": 8}
    message = refusal(family.train, small(name, **changes), str(tmp_path / "run"))
    assert expected in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", [*ON_A_BASE, OWN_PRETRAINED])
def test_a_base_that_does_not_fit_gets_one_line_and_nothing_is_written(trained, case, tmp_path):
    name, family = case.split(" on ")[0], FAMILIES[case.split(" on ")[0]]
    base = family.base
    other = name if base.required else "vqvae"
    expected = {
        str(tmp_path / "nowhere"): "does not exist",
        trained(other).path: f"is a run of {other}, not of {base.model}: pass the directory of a {base.model} run",
    }
    if base.required:
        expected[None] = f"missing key 'config.{base.dir_key}': the run directory of a {base.model} run"
    for base_dir, message in expected.items():
        assert message in refusal(family.train, small(name, **{base.dir_key: base_dir}), str(tmp_path / "run"))
    changes = {base.dir_key: trained(base.model).path, "dataset": "mixture"}
    changes |= {"mask_generator": {"name": "BernoulliMaskGenerator"}}
    config = small(name, **changes)
    message = "trained on data of shape (8, 8, 1), but config.dataset has shape (8,)"
    assert message in refusal(family.train, config, str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())
