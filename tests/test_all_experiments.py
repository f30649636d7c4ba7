"""The list of all experiments: its commands, its order, and what it reports."""

import dataclasses
import importlib

import pytest

from benchmarks import reproduce
from helpers.configs import CONFIGS, ROOT, load
from posterior_matching.evaluation import acquisition, inpainting, likelihood, uci

EVALUATIONS = {
    "eval_pm_vae_uci.py": uci,
    "eval_pm_vqvae.py": inpainting,
    "eval_pm_vdvae_imputation.py": inpainting,
    "eval_pm_vdvae_likelihood.py": likelihood,
    "eval_greedy_acquisition.py": acquisition,
}
OWN_DATA = ("_table", "_images")  # configs for the user's own data


def run(name, folder):
    return reproduce.Run(name, 0, folder)


def test_every_config_for_given_data_is_an_experiment():
    assert set(reproduce.EXPERIMENTS) == {name for name in CONFIGS if not name.endswith(OWN_DATA)}


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_every_command_names_a_script_its_config_and_their_options(name, tmp_path):
    experiment = reproduce.EXPERIMENTS[name]
    train, *evaluations = run(name, tmp_path).commands()
    assert (ROOT / train[0]).exists() and f"train_{experiment.family}.py" == train[0]
    assert {argument.partition("=")[0].removeprefix("--config.") for argument in train[3:-2]} <= set(load(name))
    base = importlib.import_module(f"train_{experiment.family}").FAMILY.base
    assert (experiment.base is not None) == (base is not None and base.required)
    if experiment.base is not None:
        assert list(reproduce.EXPERIMENTS).index(experiment.base) < list(reproduce.EXPERIMENTS).index(name)
    for script, _, _, *arguments in evaluations:
        options = {argument.removeprefix("--").partition("=")[0] for argument in arguments}
        assert options <= {field.name for field in dataclasses.fields(EVALUATIONS[script].Options)}


@pytest.fixture
def scripts(monkeypatch):
    """Replaces the scripts; those whose command holds a string in `broken` fail."""
    calls, broken = [], []

    def call(command):
        calls.append(command)
        if any(word in " ".join(command) for word in broken):
            return "no network"
        folder = reproduce.pathlib.Path(command[command.index("--run_dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        if command[0].startswith("train_"):
            (folder / "config.json").write_text("{}")
            (folder / "metrics.jsonl").write_text('{"step": 1, "val_clustering_accuracy": 0.75}\n')
        else:
            results = folder / "uci_results"
            results.mkdir(exist_ok=True)
            (results / "results.json").write_text('{"metrics": {"nrmse": {"mean": 0.5}}}')
        return None

    monkeypatch.setattr(reproduce, "_call", call)
    monkeypatch.setattr(reproduce, "_commit", lambda: "abc1234")
    return calls, broken


def test_what_is_done_is_not_run_again_and_what_is_gone_is(scripts, tmp_path):
    calls, _ = scripts
    run("pm_vae_gas", tmp_path).run()
    assert [command[0] for command in calls] == ["train_pm_vae.py", "eval_pm_vae_uci.py"]
    assert run("pm_vae_gas", tmp_path).status() == "done"
    run("pm_vae_gas", tmp_path).run()
    assert len(calls) == 2
    (tmp_path / "pm_vae_gas_0" / "config.json").unlink()
    run("pm_vae_gas", tmp_path).run()
    assert len(calls) == 4


def test_a_failure_is_reported_tried_again_and_stops_only_what_builds_on_it(scripts, tmp_path):
    calls, broken = scripts
    broken.append("vade_digits")
    vade, pm_vade = run("vade_digits", tmp_path), run("pm_vade_digits", tmp_path)
    vade.run()
    pm_vade.run()
    assert vade.status() == "not run: no network" and len(calls) == 1
    assert pm_vade.status() == "not run: needs vade_digits, which is not trained"
    broken.clear()
    vade.run()
    pm_vade.run()
    assert vade.status() == pm_vade.status() == "done"


def test_an_evaluation_that_fails_leaves_the_training_done(scripts, tmp_path):
    calls, broken = scripts
    broken.append("eval_")
    run("pm_vae_gas", tmp_path).run()
    assert run("pm_vae_gas", tmp_path).status() == "trained, not evaluated: no network"
    broken.clear()
    run("pm_vae_gas", tmp_path).run()
    assert [command[0] for command in calls] == ["train_pm_vae.py", "eval_pm_vae_uci.py", "eval_pm_vae_uci.py"]


@pytest.mark.usefixtures("scripts")
def test_the_table_shows_ours_beside_published_numbers_and_what_is_missing(tmp_path):
    for seed in range(3):
        reproduce.Run("pm_vae_gas", seed, tmp_path).run()
    names = ("pm_vae_gas", "pm_vae_power", "vade_mnist")
    table = reproduce.table([reproduce.Run(name, seed, tmp_path) for name in names for seed in range(3)])
    rows = {tuple(cell.strip("` ") for cell in line.split("|")[1:7]) for line in table.splitlines()}
    assert ("pm_vae_gas", "nrmse", "0.5", "3", "0.335", "") in rows
    assert ("pm_vae_gas", "ac_ll_nats", "not run", "0", "9.643", "10.272") in rows
    assert ("pm_vae_power", "nrmse", "not run", "0", "0.828", "") in rows
    assert "vade_mnist" not in table


def test_means_have_the_standard_error_over_seeds_unless_all_agree():
    assert reproduce._mean_and_error([1.0, 2.0, 3.0]) == "2 ± 0.58"  # 1 / sqrt(3)
    assert reproduce._mean_and_error([0.7828]) == reproduce._mean_and_error([0.7828, 0.7828 + 1e-16]) == "0.7828"


@pytest.mark.usefixtures("scripts")
def test_results_are_written_between_two_lines_of_a_document(tmp_path):
    document = tmp_path / "RESULTS.md"
    document.write_text("before\n<!-- reproduce.py: begin -->\nold\n<!-- reproduce.py: end -->\nafter\n")
    reproduce.main(tmp_path / "runs", ["pm_vae_gas"], 1, status=False, document=None)
    reproduce.main(tmp_path / "runs", ["pm_vae_gas"], 1, status=False, document=str(document))
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| `pm_vae_gas` | `nrmse` | 0.5 | 1 |" in text


@pytest.mark.process
def test_a_script_that_fails_gives_its_last_line(tmp_path):
    (tmp_path / "fails.py").write_text("import sys; print('so far', file=sys.stderr); sys.exit('error: no network\\n')")
    assert reproduce._call([str(tmp_path / "fails.py")]) == "no network"
