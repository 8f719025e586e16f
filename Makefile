# Everything runs in a virtual environment of its own; only Python >= 3.11, git and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RESULTS ?= build/bench

.PHONY: help setup demo test check format bench export-parity ablations verify-kernel gpu-check clean
help:           ## Show the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(VENV)/.done ## Make the virtual environment and install everything a CPU user needs

$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[adapt,bench,export,cpu,dev]"
	touch $@

demo: setup     ## Adapt, evaluate, predict, export and verify on the embedded benchmark of drawn animals
	$(BIN)/microclip-deploy demo

test: setup     ## Run the default test suite, in as many processes as there are cores, at most four
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: setup    ## Lint, format check, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup   ## Reformat the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i microclip_deploy/cuda/*.cu* tests/cuda/on_cpu/*

bench: setup    ## Time a model, its stages and peers, and a training step on this CPU (under five minutes)
	$(BIN)/microclip-deploy bench ViT-B-32 --batches 1,8 --warmup 1s --duration 3s --until-stable 10% --out $(RESULTS)
	$(BIN)/microclip-deploy bench adapt --batch-size 8 --crops 4 --repeats 2 --out $(RESULTS)

export-parity: setup ## Hold exported graphs of well-known sizes against PyTorch
	$(BIN)/python -m microclip_deploy.bench.export_parity --geometries tiny,ViT-B-32,ViT-B-16

ablations: setup ## Rerun the ablation tables on both embedded benchmarks (some hours on two cores)
	$(BIN)/python -m microclip_deploy.bench.training.ablations
	$(BIN)/python -m microclip_deploy.bench.training.ablations --benchmark letters

verify-kernel: setup ## Compare 20,000 graphs with float64, and print a table (some minutes)
	NCUT_GRAPHS=20000 $(BIN)/python -m pytest -q -s tests/cuda/test_kernel_families.py

gpu-check: setup ## Everything only a GPU can show (needs one, and cupy-cuda13x): tests, sanitizers, stress, speed
	PYTHON=$(BIN)/python bench/gpu_check.sh $(OUT)

clean:          ## Remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
