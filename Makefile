# `make demo` and `make test` need only Python 3.11 to 3.13 (PYTHON=... chooses one) and a package index.
PYTHON ?= python3
BIN = .venv/bin
DEMO = runs/demo

.PHONY: demo test lint install clean-demo

install: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "error: Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: install
	rm -rf $(DEMO)
	$(BIN)/python train_pm_vae.py --config configs/pm_vae_digits.py --run_dir $(DEMO)
	$(BIN)/python eval_pm_vae_uci.py --run_dir $(DEMO) --num_samples 64 --num_trials 2 --baselines
	@echo
	@echo "pictures:    $(DEMO)/uci_results/imputations.png"
	@echo "numbers:     $(DEMO)/uci_results/results.json"
	@echo "TensorBoard: $(BIN)/tensorboard --logdir runs"

# Files in alphabetical order: by default those of fewest tests, among them the longest, would come last.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
