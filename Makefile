# Python 3.11 to 3.13 and a package index are all that is needed. `make help` lists the targets.
PYTHON ?= python3
BIN = .venv/bin
DEMO = runs/demo

.PHONY: help install demo test test-fast test-matrix lint

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 chooses the Python that .venv is made with."

install: .venv/installed  ## create .venv and install the pinned versions

.venv/installed: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13: choose one with make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps -e .
	@touch $@

demo: install  ## train a PM-VAE on scikit-learn's digits, evaluate it and save pictures
	rm -rf $(DEMO)
	$(BIN)/python train_pm_vae.py --config configs/pm_vae_digits.py --run_dir $(DEMO)
	$(BIN)/python eval_pm_vae_uci.py --run_dir $(DEMO) --num_samples 64 --num_trials 2 --baselines
	@echo
	@echo "pictures:    $(DEMO)/uci_results/imputations.png"
	@echo "numbers:     $(DEMO)/uci_results/results.json"
	@echo "TensorBoard: $(BIN)/tensorboard --logdir runs"

# --no-loadscope-reorder: in the default order, the files with few but long tests come last and leave one worker idle.
test: install  ## run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: install  ## run the tests that start no process and train no model
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not process and not slow"

test-matrix:  ## run the fast tests with every promised version of Python and JAX that can be had here
	$(PYTHON) tests/matrix.py

lint: install  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
