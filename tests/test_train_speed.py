"""The measurements of training steps and evaluations, and the comparison of two checkouts."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import timing
from helpers.scripts import run_script

pytestmark = pytest.mark.process
CONFIG = "configs/pm_vae_gas_gaussian.py"
SHORT = ["--seconds=0.1", "--config.batch_size=2", "--matrix_size=64", "--products=False"]
ARGUMENTS = ["--config", CONFIG, *SHORT, "--rounds", "1"]
SCRIPT = f"""
import sys
assert sys.argv[1:] == {[f"--config={CONFIG}", *SHORT]}, sys.argv
print("steps per second       0.5  (3 samples, 0.5 to 0.5)")
"""


def test_two_checkouts_are_measured_with_the_same_arguments(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "train_speed.py").write_text(SCRIPT)
    out, _ = run_script("benchmarks/train_speed", *ARGUMENTS, f"--against={tmp_path}")
    theirs, ours, ratio = map(float, re.findall(r"[\d.]+", out.splitlines()[0])[1:])
    assert theirs == 0.5 and ours > 0.5 and ratio == pytest.approx(ours / theirs, rel=1e-3)
    assert out.splitlines()[1].startswith(f"ratio, ours / theirs: median {ratio:.3f}")


def test_a_checkout_that_cannot_be_measured(tmp_path):
    _, err = run_script("benchmarks/train_speed", *ARGUMENTS, f"--against={tmp_path}", status=1)
    assert err.startswith("error: ") and "is not a checkout" in err and err.count("\n") == 1


def test_products_are_counted_in_the_programs_that_a_program_calls():
    def program(a, kernel):
        a = jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ a), None), a, None, length=3)[0]
        return jax.lax.conv(jax.jit(lambda a: a @ a)(a)[None, None], kernel, (1, 1), "SAME")

    jaxpr = jax.make_jaxpr(jax.grad(lambda *operands: program(*operands).sum()))(
        jnp.ones((8, 8)), jnp.ones((1, 1, 3, 3))
    )
    products, seconds = timing.seconds_of_products(jaxpr.jaxpr)
    forward, backward = 3 + 1 + 1, 3 * 2 + 2 + 1  # the kernel has no gradient
    assert products == forward + backward and seconds > 0


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("pm_vqvae_digits", ["imputations", "imputations without cache"]),
        ("lookahead_digits", ["decisions by sampling", "decisions by lookahead"]),
    ],
)
def test_what_evaluations_compute_is_measured(name, counted):
    small = ["--batch_size=2", "--num_samples=2", "--repeats=1", "--prd_images=40"]
    products = name == "lookahead_digits"
    out, _ = run_script("benchmarks/evaluation_speed", f"--config=configs/{name}.py", *small, f"--products={products}")
    for what in counted:
        assert float(re.search(rf"^{what} per second +(\S+)", out, re.MULTILINE)[1]) > 0
    assert len(re.findall(r"^  its products alone +\d+% of the time, \d+ of them$", out, re.MULTILINE)) == 2 * products
    assert float(re.search(r"^precision and recall +(\S+) s for 40 images", out, re.MULTILINE)[1]) > 0


def test_single_convolutions_are_measured():
    out, _ = run_script("benchmarks/convolutions", "--pixels=4", "--pixels=3", "--batch=2", "--width=4", "--middle=2")
    names = [line.partition("  forward")[0].strip() for line in out.splitlines()]
    assert names[1:] == ["4 pixels, 3x3", "4 pixels, 1x1", "3 pixels, 3x3", "3 pixels, 1x1"]
    found = re.findall(r"forward +(\d+)  input gradient +(\d+)  kernel gradient +(\d+)$", out, re.MULTILINE)
    assert len(found) == 4
    _, err = run_script("benchmarks/convolutions", "--pixels=wide", status=1)
    assert err.startswith("error: ") and "pixels" in err and err.count("\n") == 1


def test_the_published_code_is_measured_in_its_own_python(tmp_path):
    (tmp_path / "posterior_matching" / "models").mkdir(parents=True)
    (tmp_path / "posterior_matching" / "models" / "pixel_cnn.py").touch()
    old_python = tmp_path / "old_python"
    checks = f'[ "$2 $3" = "--checkout=$PWD --config={CONFIG}" ] || exit 1'
    old_python.write_text(f'#!/bin/sh\n{checks}\necho "steps per second       0.5"\n')
    old_python.chmod(0o755)
    _, err = run_script("benchmarks/train_speed", *ARGUMENTS, f"--against={tmp_path}", status=1)
    assert err.startswith("error: ") and "--published_python" in err and err.count("\n") == 1
    against = [f"--against={tmp_path}", f"--published_python={old_python}"]
    out, _ = run_script("benchmarks/train_speed", *ARGUMENTS, *against)
    assert out.startswith("round 1: theirs 0.5, ours ")


def test_an_option_that_the_published_code_cannot_follow_is_refused():
    command = [sys.executable, "benchmarks/published_speed.py", f"--config={CONFIG}", "--checkout=.", SHORT[1]]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode and result.stderr.endswith(f"unrecognized arguments: {SHORT[1]}\n")
    command = [*command[:2], "--config=configs/pm_vae_digits.py", "--checkout=."]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode and "is not a published experiment on gas, mnist16, mnist\n" in result.stderr
