"""Bad input on the command line: one line that names the thing and the remedy, exit status 1, nothing written."""

import functools
import json
import re
import subprocess
import sys

import pytest

from helpers.configs import QUICK, ROOT, SMALL
from helpers.runs import contents
from helpers.scripts import environment, run_script, write_config

pytestmark = pytest.mark.process


@pytest.fixture
def script(tmp_path):
    """`script(name, *arguments)` runs a script in an empty folder."""
    script = functools.partial(run_script, cwd=tmp_path / "folder")
    script.folder, script.config = tmp_path / "folder", tmp_path / "folder" / "tiny.py"
    script.folder.mkdir()
    write_config(script.config, "pm_vae_mixture", QUICK | SMALL["pm_vae_mixture"] | {"steps": 2})
    return script


PROGRESS = re.compile(r".*(/s|s/\w+)\]\s*(\x1b\[A)*")  # a state of a progress bar


def refused(script, name, *arguments, **environment):
    """Checks what every refusal has in common and returns the message."""
    before = contents(script.folder)
    out, err = script(name, *arguments, status=1, **environment)
    lines = [line for line in re.split("[\r\n]", err) if line.strip() and not PROGRESS.fullmatch(line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert contents(script.folder) == before
    assert "run directory" not in out
    return lines[0]


def train(script, *arguments, config=None, **environment):
    config = script.config if config is None else config
    return refused(script, "train_pm_vae", f"--config={config}", *arguments, "--run_dir=run", **environment)


def test_the_harness_can_succeed(script):
    out, _ = script("train_pm_vae", f"--config={script.config}", "--run_dir=run", "--config.seed=3")
    assert f"run directory: {script.folder}/run" in out
    assert json.loads((script.folder / "run" / "config.json").read_text())["config"]["seed"] == 3


# Configs -------------------------------------------------------------------------------------------------------------


def test_no_config_or_one_of_another_script(script):
    message = refused(script, "train_pm_vae", "--run_dir=run")
    assert message.startswith("error: missing flag --config: The experiment, for example configs/pm_vae_digits.py")
    message = train(script, config=ROOT / "configs" / "vade_digits.py")
    assert "unknown key 'config." in message and "(or the config is one for another script)" in message


@pytest.mark.parametrize("path", ["configs/pm_vae_nothing.py", "", "configs"])
def test_a_config_file_that_is_none(script, path):
    message = refused(script, "train_pm_vae", f"--config={path}", "--run_dir=run")
    assert f"config file '{path}' does not exist: --config takes a file" in message


@pytest.mark.parametrize(
    "text, named",
    [
        ("def get_config(:\n    pass\n", "syntax"),
        ("def get_config():\n    return undefined\n", "undefined"),
        ("import no_such_package\n", "no_such_package"),
        ("config = 3\n", "get_config"),
        ("def get_config():\n    return None\n", "get_config"),
    ],
)
def test_a_config_file_with_an_error(script, text, named):
    script.config.write_text(text)
    message = train(script)
    assert named in message and "tiny.py" in message


@pytest.mark.parametrize(
    "line, named",
    [
        ("del config.steps", "missing key 'config.steps'"),
        ("config.dataset = None", "config.dataset"),
        ("config.model.encoder.hidden_unit = 3", "'config.model.encoder.hidden_unit': did you mean 'hidden_units'?"),
        ("config.dataset, config.train_split = 'own.csv', 'train'", "'own.csv' has an infinite value (line 21)"),
    ],
)
def test_a_config_file_with_a_wrong_value(script, line, named):
    (script.folder / "own.csv").write_text("1,2\n" * 20 + "5,inf\n")
    before, end, _ = script.config.read_text().rpartition("    return config")
    script.config.write_text(f"{before}    {line}\n{end}\n")
    assert named in train(script)


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("--config.stepz=3", ["config.stepz", "did you mean 'steps'?"]),
        ("--config.model.latent_dims=3", ["config.model.latent_dims", "did you mean 'latent_dim'?"]),
        ("--config.optimiser.eps=1", ["config.optimiser", "did you mean 'optimizer'?"]),
        ("--config.steps.more=1", ["config.steps", "plain value"]),
        ("--config.optimizer=1", ["config.optimizer", "learning_rate"]),
        ("--config.steps=abc", ["config.steps", "abc", "int"]),
        ("--config.steps=1.5", ["config.steps", "1.5", "int"]),
        ("--config.optimizer.learning_rate=fast", ["config.optimizer.learning_rate", "fast", "float"]),
        ("--config.skip_nonfinite_updates=perhaps", ["config.skip_nonfinite_updates", "perhaps", "bool"]),
        ("--config.model.latent_dim=0", ["config.model.latent_dim must be at least 1, not 0"]),
        ("--confg=x.py", ["--confg", "did you mean 'config'?"]),
        ("surplus", ["'surplus'", "--name=value"]),
        ("--num_processes=2", ["--num_processes", "--coordinator_address"]),
        ("--num_processes=0", ["num_processes", "0"]),
        ("--num_processes=2 --coordinator_address=localhost:1 --process_id=2", ["--process_id"]),
    ],
)
def test_training_with_bad_arguments(script, arguments, named):
    message = train(script, *arguments.split())
    assert all(part in message for part in named), message


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("", ["missing flag --run_dir: Evaluate the run in this directory, made by train_pm_vae.py (required)."]),
        ("--run_dir=run", ["run directory run does not exist"]),
        ("--run_dir=run --num_samples=many", ["num_samples", "many"]),
        ("--run_dir=run --num_samples=0", ["num_samples must be at least 1, not 0"]),
        ("--run_dir=run --num_sample=3", ["--num_sample", "did you mean 'num_samples'?"]),
        ("--run_dir=run everything", ["'everything'"]),
    ],
)
def test_evaluating_with_bad_arguments(script, arguments, named):
    message = refused(script, "eval_pm_vae_uci", *arguments.split())
    assert all(part in message for part in named), message


@pytest.mark.parametrize("dataset", ["gas", "mnist"])
def test_a_dataset_that_is_not_there_and_no_network(script, dataset):
    proxy = "http://127.0.0.1:9"  # nothing listens there
    environment = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy)
    environment |= {"no_proxy": "", "NO_PROXY": "", "TFDS_DATA_DIR": str(script.folder.parent / "tfds")}
    message = train(script, f"--config.dataset={dataset}", "--config.train_split=train", **environment)
    assert f"cannot download dataset '{dataset}'" in message
    assert str(script.folder.parent / "tfds") in message  # where to put what another machine downloads


# Flags that work -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_user, expected", [(None, "highest"), ("bfloat16", "bfloat16")])
def test_evaluations_multiply_in_float32_unless_told_otherwise(of_user, expected):
    program = "import jax; from posterior_matching import cli; "
    program += "cli.run(lambda: print('precision', jax.config.jax_default_matmul_precision), exact=True)"
    variables = environment(**{"JAX_DEFAULT_MATMUL_PRECISION": of_user} if of_user else {})
    out = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["precision", expected]


SHARED = {"run_dir", "dataset", "split", "checkpoint", "num_instances", "batch_size", "num_samples", "seed"}


@pytest.mark.parametrize("name", [path.stem for path in sorted(ROOT.glob("eval_*.py"))])
def test_help_is_a_page_of_sentences_with_defaults_and_an_example(script, name):
    out, _ = script(name, "--help", status=1)  # absl's
    assert re.search(rf"^    python {name}\.py --run_dir ", out, re.MULTILINE)
    found = {}
    for flag, text in re.findall(r"^  --(?:\[no\])?(\w+): (.*(?:\n    .*)*)", out, re.MULTILINE):
        sentence, _, default = re.sub(r"\s+", " ", text).partition(" (default:")
        sentence = sentence.removesuffix(" (an integer)")
        found[flag] = sentence
        assert re.fullmatch(r"[A-Z].*\.", sentence), text
        assert default or "by default" in sentence or "(required)" in sentence, text
    assert found.keys() >= SHARED
    masks, trials = "mask_generator" in found, "num_trials" in found
    assert masks == trials == (name != "eval_greedy_acquisition")
