"""Compiled programs on disk: found without tracing, only where they compute the same, and never in the way."""

import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import synthetic
from helpers.arrays import Compilations
from helpers.configs import FAMILIES, small, untrained
from helpers.runs import rows
from helpers.scripts import run_script
from posterior_matching import parallel
from posterior_matching.training import program_cache
from posterior_matching.training.program_cache import CachedFunction, keep_programs_in
from posterior_matching.training.step import CompiledPhase, _compiled

X = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for programs, in a process whose code counts as read from files."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)
    keep_programs_in(tmp_path / "programs")
    yield tmp_path / "programs"
    keep_programs_in(None)


class Call:
    """One call of a cached function as by a new process: its result, and how often it was traced and compiled."""

    def __init__(self, x=X, program="sum", factor=2.0):
        self.traced = 0

        def total(x):
            self.traced += 1
            return jax.lax.psum(factor * x, parallel.AXIS), {"shape": jnp.float32(x.size)}

        compilations = Compilations()
        (self.result, extra) = CachedFunction(parallel.pmap(total, donate_argnums=0), program)(x)
        self.compiled = len(compilations)
        np.testing.assert_array_equal(extra["shape"], x[0].size)
        np.testing.assert_allclose(self.result, np.broadcast_to(factor * x.sum(0), x.shape), rtol=1e-6)


def test_a_program_is_traced_and_compiled_once(folder):
    first, second = Call(), Call()
    assert (first.traced, first.compiled) == (1, 1)
    assert (second.traced, second.compiled) == (0, 0)
    assert len(list(folder.iterdir())) == 2  # the program, and what it is known as


def test_without_a_folder_nothing_is_kept(tmp_path):
    assert [Call().traced, Call().traced] == [1, 1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"x": X[:, :2]}, {"x": X.astype(np.int32)}, {"program": "another"}])
def test_what_differs_is_traced(folder, change):  # noqa: ARG001
    Call()
    assert Call(**change).traced == 1
    assert Call().traced == Call(**change).traced == 0


def test_options_of_jax_and_xla_tell_programs_apart(folder, monkeypatch):  # noqa: ARG001
    Call()
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=false")
    assert Call().traced == 1
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        assert Call().traced == 1
    finally:
        jax.config.update("jax_default_matmul_precision", None)
    assert Call().traced == 0


def test_changed_code_is_traced_and_compiled_only_if_the_program_changes(folder, tmp_path, monkeypatch):
    source = tmp_path / "code_of_the_user.py"
    source.write_text("factor = 2.0")
    module = types.ModuleType("code_of_the_user")
    module.__file__ = str(source)
    monkeypatch.setitem(sys.modules, "code_of_the_user", module)
    keep_programs_in(folder)
    Call()
    source.write_text("factor = 2.0  # as before")
    keep_programs_in(folder)  # a new process
    same = Call()
    assert (same.traced, same.compiled) == (1, 0)
    assert Call().traced == 0
    before = source.stat()
    source.write_text("factor = 3.0  # as before")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))  # neither time nor size tell
    keep_programs_in(folder)
    other = Call(factor=3.0)
    assert (other.traced, other.compiled) == (1, 1)


def test_code_that_is_typed_in_or_cannot_be_pickled_is_traced_but_not_compiled_again(folder, monkeypatch):
    Call()
    unnamed = Call(program=lambda: None)
    assert (unnamed.traced, unnamed.compiled) == (1, 0)
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    keep_programs_in(folder)
    for _ in range(2):
        typed = Call()
        assert (typed.traced, typed.compiled) == (1, 0)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: content[:-9] + bytes(9), lambda _: b""]
)
def test_damaged_files_are_replaced(folder, damage):
    Call()
    for path in list(folder.iterdir()):
        path.write_bytes(damage(path.read_bytes()))
    assert Call().compiled == 1
    again = Call()
    assert (again.traced, again.compiled) == (0, 0)


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path, folder, caplog):  # noqa: ARG001
    (tmp_path / "file").write_text("in the way")
    keep_programs_in(tmp_path / "file")
    assert [Call().compiled, Call().compiled] == [1, 1]
    assert "not storing a compiled program" in caplog.text


def test_the_cache_of_jax_stays_as_it_was(folder):  # noqa: ARG001
    enabled = jax.config.values["jax_enable_compilation_cache"]
    Call(program="new")
    assert jax.config.values["jax_enable_compilation_cache"] == enabled


@pytest.mark.parametrize("name", FAMILIES)
def test_programs_of_every_family_are_known_by_their_config(folder, name):  # noqa: ARG001
    def description(**changes):
        _compiled.cache_clear()  # a new process would make the program anew
        chosen = untrained(name, small(name, **changes), synthetic.dataset("digits", 16))
        phase = CompiledPhase(chosen, chosen.phases[-1], 0, 1)
        return program_cache._description("train_steps", phase.train._program, ())

    assert description() is not None
    assert description() == description(seed=3)
    assert description() != description(**{"optimizer.learning_rate": 0.5})


def test_what_a_program_from_disk_tells_benchmarks(folder):  # noqa: ARG001
    def measured():
        _compiled.cache_clear()
        devices = jax.device_count()
        step = synthetic.TrainingStep("pm_vae_digits", small("pm_vae"), synthetic.dataset("digits", 16 * devices))
        step.run()
        step.run()
        return step.compiled.cost_analysis()["flops"], str(step.jaxpr())

    flops, text = measured()
    assert flops > 0 and text.count("dot_general") > 0
    assert measured() == (flops, text)


@pytest.mark.process
def test_a_script_finds_its_programs(tmp_path):
    def train(run, *changes):
        folder = tmp_path / "cache" / "programs"
        before = set(folder.glob("*"))
        quick = ["--config=configs/pm_vae_mixture.py", "--config.steps=2", "--config.validation_every=1"]
        run_dir = f"--run_dir={tmp_path / run}"
        run_script("train_pm_vae", *quick, *changes, run_dir, POSTERIOR_MATCHING_CACHE=str(tmp_path / "cache"))
        return len(set(folder.glob("*")) - before), rows(tmp_path / run)

    first, losses = train("first")
    assert first == 4  # training and validation, and what each is known as
    assert train("again") == (0, losses)
    new, others = train("seed", "--config.seed=1")
    assert new == 0 and others != losses
