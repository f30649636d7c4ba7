"""Bad input on the command line: one line that names the thing and the remedy, exit status 1, nothing written."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.configs import QUICK, ROOT, SMALL
from helpers.runs import contents
from helpers.scripts import environment, write_config

pytestmark = pytest.mark.process

# Importing takes longer than most of these cases, so one process imports everything and every case is a fork of it.
SERVER = """
import json, os, runpy, signal, sys
import posterior_matching.evaluation.examples, train_pm_vae, tensorflow_datasets
for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if not child:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(case[name], os.O_WRONLY | os.O_CREAT), number)
        os.chdir(case["folder"])
        os.environ.update(case["environment"])
        sys.argv = case["arguments"]
        sys.path[0] = os.path.dirname(sys.argv[0])
        signal.alarm(120)
        status = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 70
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    variables = environment()
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # Python would leave more behind for a user
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER], env=variables, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def script(server, tmp_path):
    """`script(name, *arguments)` runs a script in an empty folder and returns status, out, err and files."""
    folder = tmp_path / "folder"
    folder.mkdir()

    def run(name, *arguments, **environment):
        out, err = tmp_path / "out", tmp_path / "err"
        out.unlink(missing_ok=True), err.unlink(missing_ok=True)
        case = {"arguments": [str(ROOT / f"{name}.py"), *map(str, arguments)], "environment": environment}
        case |= {"folder": str(folder), "out": str(out), "err": str(err)}
        server.stdin.write(json.dumps(case) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return SimpleNamespace(status=status, out=out.read_text(), err=err.read_text())

    run.folder = folder
    run.config = folder / "tiny.py"
    write_config(run.config, "pm_vae_mixture", QUICK | SMALL["pm_vae_mixture"] | {"steps": 2})
    return run


PROGRESS = re.compile(r".*(/s|s/\w+)\]\s*(\x1b\[A)*")  # a state of a progress bar


def refused(script, name, *arguments, **environment):
    """Checks what every refusal has in common and returns the message."""
    before = contents(script.folder)
    result = script(name, *arguments, **environment)
    lines = [line for line in re.split("[\r\n]", result.err) if line.strip() and not PROGRESS.fullmatch(line)]
    assert result.status == 1, result.err
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    assert contents(script.folder) == before
    assert "run directory" not in result.out
    return lines[0]


def train(script, *arguments, config=None, **environment):
    config = script.config if config is None else config
    return refused(script, "train_pm_vae", f"--config={config}", *arguments, "--run_dir=run", **environment)


def test_the_harness_can_succeed(script):
    result = script("train_pm_vae", f"--config={script.config}", "--run_dir=run", "--config.seed=3")
    assert result.status == 0, result.err
    assert f"run directory: {script.folder}/run" in result.out
    assert json.loads((script.folder / "run" / "config.json").read_text())["config"]["seed"] == 3


# The config ----------------------------------------------------------------------------------------------------------


def test_no_config(script):
    message = refused(script, "train_pm_vae", "--run_dir=run")
    assert message.startswith("error: missing flag --config: The experiment, for example configs/pm_vae_digits.py")


def test_a_config_of_another_script(script):
    message = train(script, config=ROOT / "configs" / "vade_digits.py")
    assert "unknown key 'config." in message and "(or the config is one for another script)" in message


@pytest.mark.parametrize("argument", ["--config=configs/pm_vae_nothing.py", "--config=", "--config=configs"])
def test_a_config_file_that_is_none(script, argument):
    message = refused(script, "train_pm_vae", argument, "--run_dir=run")
    assert "config" in message
    if "nothing" in argument:
        assert "configs/pm_vae_nothing.py" in message


@pytest.mark.parametrize(
    "text, named",
    [
        ("def get_config(:\n    pass\n", "syntax"),
        ("def get_config():\n    return undefined\n", "undefined"),
        ("import no_such_package\n", "no_such_package"),
        ("from configs import no_such_name\n", "no_such_name"),
        ("def get_config():\n    return 1 / 0\n", "division"),
        ("raise RuntimeError('broken on purpose')\n", "broken on purpose"),
        ("config = 3\n", "get_config"),
        ("def get_config():\n    return None\n", "get_config"),
    ],
)
def test_a_config_file_with_an_error(script, text, named):
    script.config.write_text(text)
    message = train(script)
    assert named in message and "tiny.py" in message


@pytest.mark.parametrize(
    "argument, named",
    [
        ("--config.stepz=3", ["config.stepz", "did you mean 'steps'?"]),
        ("--config.model.latent_dims=3", ["config.model.latent_dims", "did you mean 'latent_dim'?"]),
        ("--config.optimizer.learning_rat=1", ["config.optimizer.learning_rat", "did you mean 'learning_rate'?"]),
        ("--config.optimiser.eps=1", ["config.optimiser", "did you mean 'optimizer'?"]),
        ("--config.steps.more=1", ["config.steps", "plain value"]),
        ("--config.optimizer=1", ["config.optimizer", "learning_rate"]),
        ("--config.steps=abc", ["config.steps", "abc", "int"]),
        ("--config.steps=1.5", ["config.steps", "1.5", "int"]),
        ("--config.steps=", ["config.steps", "int"]),
        ("--config.optimizer.learning_rate=fast", ["config.optimizer.learning_rate", "fast", "float"]),
        ("--config.skip_nonfinite_updates=perhaps", ["config.skip_nonfinite_updates", "perhaps", "bool"]),
        ("--config.optimizer.transition_steps=0", ["config.optimizer.transition_steps must be at least 1, not 0"]),
        ("--config.model.latent_dim=0", ["config.model.latent_dim must be at least 1, not 0"]),
    ],
)
def test_a_bad_override(script, argument, named):
    message = train(script, argument)
    assert all(part in message for part in named), message


def add(script, line):
    """Adds a line to the config's file."""
    before, end, _ = script.config.read_text().rpartition("    return config")
    script.config.write_text(f"{before}    {line}\n{end}\n")


@pytest.mark.parametrize(
    "line, named",
    [
        ("config.stepz = 3", ["config.stepz", "did you mean 'steps'?"]),
        ("config.model.latent_dims = 3", ["config.model.latent_dims", "did you mean 'latent_dim'?"]),
        ("config.model.encoder.hidden_unit = 3", ["config.model.encoder.hidden_unit", "'hidden_units'"]),
        ("config.optimizer.momentum = 0.9", ["config.optimizer.momentum"]),
        ("config.mask_generator.q = 0.5", ["config.mask_generator.q"]),
        ("del config.steps", ["missing key 'config.steps'"]),
        ("del config.model", ["missing key 'config.model'"]),
        ("config.dataset = None", ["config.dataset"]),
    ],
)
def test_a_bad_key_in_the_file(script, line, named):
    add(script, line)
    message = train(script)
    assert all(part in message for part in named), message


# Data and masks ------------------------------------------------------------------------------------------------------

SOME = np.random.default_rng(0).normal(size=(40, 3))


def write_csv(path, cell=None, columns=3):
    table = [[f"{value:.4f}" for value in row[:columns]] for row in SOME]
    if cell is not None:
        table[4][1] = cell
    path.write_text("\n".join(map(",".join, table)) + "\n")


def test_an_unknown_dataset(script):
    message = train(script, "--config.dataset=mixtur")
    assert "unknown dataset 'mixtur'" in message and "did you mean mixture" in message


@pytest.mark.parametrize("name", ["absent.csv", "absent.npy", "absent.npz"])
def test_a_missing_file(script, name):
    assert f"no file '{name}'" in train(script, f"--config.dataset={name}")


@pytest.mark.parametrize(
    "cell, named",
    [("blue", ["column 2", "'blue' (line 5)"]), ("inf", ["column 2", "infinite value (line 5)"])],
)
def test_a_csv_with_a_bad_cell(script, cell, named):
    write_csv(script.folder / "own.csv", cell)
    message = train(script, "--config.dataset=own.csv", "--config.train_split=train")
    assert "own.csv" in message and all(part in message for part in named), message


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--config.mask_generator.name=BernouliMaskGenerator"], ["did you mean 'BernoulliMaskGenerator'?"]),
        (["--config.mask_generator.p=1.5"], ["BernoulliMaskGenerator", "p must lie in [0, 1]"]),
    ],
)
def test_bad_masks(script, arguments, named):
    message = train(script, *arguments)
    assert all(part in message for part in named), message


def test_a_mask_generator_for_images_on_features(script):
    line = 'config.mask_generator = {"name": "MNISTMaskGenerator"}'
    add(script, line)
    message = train(script)
    assert "MNISTMaskGenerator" in message and "(8,)" in message and "use BernoulliMaskGenerator" in message


@pytest.mark.parametrize("dataset", ["gas", "mnist"])
def test_a_dataset_that_is_not_there_and_no_network(script, dataset):
    proxy = "http://127.0.0.1:9"  # nothing listens there
    environment = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy)
    environment |= {"no_proxy": "", "NO_PROXY": "", "TFDS_DATA_DIR": str(script.folder.parent / "tfds")}
    message = train(script, f"--config.dataset={dataset}", "--config.train_split=train", **environment)
    assert f"cannot download dataset '{dataset}'" in message
    assert str(script.folder.parent / "tfds") in message  # where to put what another machine downloads


def test_training_that_diverges(script):
    arguments = ["--run_dir=run", "--config.optimizer.learning_rate=1e30", "--config.steps=40", "--config.log_every=2"]
    result = script("train_pm_vae", f"--config={script.config}", *arguments)
    lines = [line for line in re.split("[\r\n]", result.err) if line.strip() and not PROGRESS.fullmatch(line)]
    assert result.status == 1 and len(lines) == 1, result.err
    assert re.match(r"error: .*loss.* not finite at step \d+; no checkpoint was saved", lines[0]), lines[0]
    assert "config.optimizer.learning_rate" in lines[0]
    assert not list((script.folder / "run" / "checkpoints" / "latest").iterdir())


# Flags ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--rundir=other"], ["--rundir", "did you mean 'run_dir'?"]),
        (["--confg=x.py"], ["--confg", "did you mean 'config'?"]),
        (["surplus"], ["'surplus'", "--name=value"]),
        (["--num_processes=2"], ["--num_processes", "--coordinator_address"]),
        (["--num_processes=0"], ["num_processes", "0"]),
        (["--num_processes=many"], ["num_processes", "many"]),
        (["--num_processes=2", "--coordinator_address=localhost:1", "--process_id=2"], ["--process_id"]),
    ],
)
def test_bad_flags(script, arguments, named):
    message = train(script, *arguments)
    assert all(part in message for part in named), message


# Run directories -----------------------------------------------------------------------------------------------------


def write_run(folder, **changes):
    folder.mkdir()
    network = {"name": "ResidualMLP", "residual_blocks": 0, "hidden_units": 4}
    model = {"latent_dim": 2, "encoder": network, "decoder": network}
    model |= {"posterior": {"name": "DiagonalGaussian"}, "likelihood": {"name": "IdentityGaussian"}}
    model = {"pm_vae": model} if changes.get("model") == "lookahead" else model
    config = {"dataset": "mixture", "train_split": "test", "evaluate_checkpoint": "latest", "model": model}
    config["mask_generator"] = {"name": "BernoulliMaskGenerator"}
    description = {"model": "pm_vae", "config": config, "input_shape": [8], "standardisation": None} | changes
    (folder / "config.json").write_text(json.dumps(description))


def test_a_run_directory_that_is_something_else(script):
    (script.folder / "run").mkdir()
    (script.folder / "run" / "notes.txt").write_text("mine")
    assert "exists and is not a run directory" in train(script)


def test_a_pretrained_run_that_is_missing_or_has_no_weights(script):
    assert "run directory base does not exist" in train(script, "--config.pretrained_dir=base")
    write_run(script.folder / "base", model="vqvae")
    assert "base is a run of vqvae, not of pm_vae" in train(script, "--config.pretrained_dir=base")
    write_run(script.folder / "other")
    assert "other holds no latest checkpoint" in train(script, "--config.pretrained_dir=other")


def evaluate(script, *arguments):
    return refused(script, "eval_pm_vae_uci", *arguments)


def test_evaluating_no_run(script):
    assert evaluate(script) == (
        "error: missing flag --run_dir: Evaluate the run in this directory, made by train_pm_vae.py (required)."
    )
    assert "run directory run does not exist" in evaluate(script, "--run_dir=run")
    (script.folder / "empty").mkdir()
    assert "empty is not a run directory: it has no config.json" in evaluate(script, "--run_dir=empty")
    write_run(script.folder / "other", model="vqvae")
    message = evaluate(script, "--run_dir=other")
    assert "other is a run of vqvae, not of pm_vae: pass the directory of a pm_vae run" in message
    write_run(script.folder / "run")
    assert "holds no latest checkpoint" in evaluate(script, "--run_dir=run")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--mask_generator=Bernoulli"], ["unknown mask_generator", "did you mean 'BernoulliMaskGenerator'?"]),
        (["--mask_generator=MNISTMaskGenerator"], ["MNISTMaskGenerator", "use BernoulliMaskGenerator"]),
        (
            ["--mask_generator=UniformMaskGenerator:bounds=0.5"],
            ["bounds must be a valid tuple, not 0.5"],
        ),
        (
            ["--mask_generator=UniformMaskGenerator:bound=0.5,1.0"],
            ["unknown key 'mask_generator.bound'", "takes bounds"],
        ),
        (["--split=tset"], ["no split 'tset'", "train, val, test"]),
        (["--num_instances=3000"], ["num_instances=3000", "2000 examples"]),
        (["--num_instances=0"], ["num_instances must be at least 1, not 0"]),
        (["--dataset=digits"], ["digits", "(8, 8, 1)", "(8,)"]),
        (["--dataset=own.csv", "--split=all"], ["own.csv", "(3,)", "(8,)"]),
        (["--checkpoint=newest"], ["checkpoint", "newest", "best"]),
        (["--num_samples=0"], ["num_samples must be at least 1, not 0"]),
        (["--num_samples=many"], ["num_samples", "many"]),
        (["--num_trials=0"], ["num_trials must be at least 1, not 0"]),
        (["--batch_size=0"], ["batch_size must be at least 1, not 0"]),
        (["--seed=-1"], ["seed must be at least 0, not -1"]),
        (["--num_sample=3"], ["--num_sample", "did you mean 'num_samples'?"]),
        (["everything"], ["'everything'"]),
    ],
)
def test_evaluating_with_bad_flags(script, arguments, named):
    write_run(script.folder / "run")
    write_csv(script.folder / "own.csv")
    message = evaluate(script, "--run_dir=run", *arguments)
    assert all(part in message for part in named), message


def test_evaluating_a_file_with_another_number_of_columns(script):
    write_run(script.folder / "run", input_shape=[3], standardisation={"mean": [0.0] * 3, "std": [1.0] * 3})
    write_csv(script.folder / "own.csv", columns=2)
    message = evaluate(script, "--run_dir=run", "--dataset=own.csv", "--split=all")
    assert "'own.csv' has 2 columns" in message and "trained on 3" in message
    assert "pass a file" in evaluate(script, "--run_dir=run", "--dataset=mixture")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--policies=samplng"], ["unknown policy 'samplng'", "did you mean 'sampling'?"]),
        (["--num_steps=1"], ["num_steps must be at least 2"]),
        (["--memory_budget_gb=nan"], ["memory_budget_gb must be a finite number"]),
        (["--num_instances=3000"], ["num_instances=3000", "2000 examples"]),
        (["--dataset=digits"], ["digits", "(8, 8, 1)", "(8,)"]),
        ([], ["num_steps must be at most 8", "not 31"]),
        (["--num_steps=8"], ["run holds no latest checkpoint"]),
    ],
)
def test_acquiring_with_bad_flags(script, arguments, named):
    write_run(script.folder / "run", model="lookahead")
    message = refused(script, "eval_greedy_acquisition", "--run_dir=run", *arguments)
    assert all(part in message for part in named), message


def test_acquiring_with_a_run_of_another_model(script):
    write_run(script.folder / "run")
    message = refused(script, "eval_greedy_acquisition", "--run_dir=run")
    assert "run is a run of pm_vae, not of lookahead: pass the directory of a lookahead run" in message


def test_a_damaged_run(script):
    write_run(script.folder / "run")
    (script.folder / "run" / "config.json").write_text('{"model": "pm_vae"}')
    assert "config.json is damaged" in evaluate(script, "--run_dir=run")


@pytest.mark.parametrize("of_user, expected", [(None, "highest"), ("bfloat16", "bfloat16")])
def test_evaluations_multiply_in_float32_unless_told_otherwise(of_user, expected):
    program = "import jax; from posterior_matching import cli; "
    program += "cli.evaluation_main(lambda seed=0: print('precision', jax.config.jax_default_matmul_precision))"
    variables = environment(**{"JAX_DEFAULT_MATMUL_PRECISION": of_user} if of_user else {})
    out = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["precision", expected]


SHARED = {"run_dir", "dataset", "split", "checkpoint", "num_instances", "batch_size", "num_samples", "seed"}


@pytest.mark.parametrize("name", [path.stem for path in sorted(ROOT.glob("eval_*.py"))])
def test_help_is_a_page_of_sentences_with_defaults_and_an_example(script, name):
    out = script(name, "--help").out
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
