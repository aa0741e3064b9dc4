# Every target does all that it needs on a machine with Python 3.11 or newer and make; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help demo demo-detection test test-slow test-cluster check-gpu lint format lock table reproduce clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(READY) ## train on the embedded digits, fuse, evaluate, print the result table (2 minutes on two cores)
	rm -rf outputs/demo
	$(BIN)/python train.py data=digits recipe=quick width=0.5 trainer=cpu name=demo
	@echo
	@$(BIN)/python -m repghost.results

demo-detection: $(READY) ## train a detector on the embedded scenes from a classifier of digits, fuse, evaluate, print the table (4.5 minutes on two cores)
	rm -rf outputs/demo-digits outputs/demo-detection
	$(BIN)/python train.py data=digits recipe=quick width=0.5 epochs=4 trainer=cpu name=demo-digits
	$(BIN)/python train.py task=detection data=digits_scenes recipe=quick_detection detector=fcos width=0.5 weights=outputs/demo-digits \
		trainer=cpu name=demo-detection
	@echo
	@$(BIN)/python -m repghost.detection.results

test: $(READY) ## the tests, without the slow ones
	$(BIN)/python -m pytest -q -n auto --dist loadfile --max-worker-restart 0 -m "not slow"

test-slow: $(READY) ## the slow tests
	$(BIN)/python -m pytest -q -m slow

# The plugins for sweeps come into an environment of their own, which sees what is in $(VENV).
CLUSTER := $(VENV)/cluster

test-cluster: $(CLUSTER)/installed ## runs on two machines under SLURM and torchrun, on a cluster in namespaces (as root, on Debian)
	$(CLUSTER)/bin/python -m pytest -q -rs tests/cluster tests/test_internals.py::test_hydra_and_its_launcher_for_slurm

$(CLUSTER)/installed: $(READY) pins.txt
	$(BIN)/python -m venv $(CLUSTER)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
		$$($(CLUSTER)/bin/python -c 'import site; print(site.getsitepackages()[0])')/locked.pth
	$(CLUSTER)/bin/python -m pip install --quiet --disable-pip-version-check --constraint pins.txt \
		hydra-submitit-launcher hydra-optuna-sweeper
	touch $@

check-gpu: $(READY) ## prove the GPU path on this machine, with a report (30 minutes on a GPU, 40 on several; ARGS=--cpu)
	$(BIN)/python benchmarks/check_gpu.py $(ARGS)

lint: $(READY) ## format, lint, types and structure
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_structure.py

format: $(READY) ## format the code and sort the imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(READY) ## resolve pyproject.toml and pins.txt into requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra train --extra deploy --extra dev --constraint pins.txt --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate --no-header --upgrade --quiet --output-file requirements.lock

table: $(READY) ## the paper's table beside what was measured, printed and written into README.md (DATA: the set's name)
	$(BIN)/python -m repghost.results $(if $(DATA),--data $(notdir $(DATA:/=))) --readme README.md

reproduce: $(READY) ## evaluate the eight published weights on the shards in DATA, print the table: make reproduce DATA=SHARDS
	@test -n "$(DATA)" || { echo "make reproduce DATA=SHARDS: the folder of ImageNet's shards is needed"; exit 2; }
	for width in 0.5 0.58 0.8 1.0 1.11 1.3 1.5 2.0; do \
		$(BIN)/python evaluate.py weights=timm width=$$width data.root="$(DATA)" || exit; \
	done
	@$(BIN)/python -m repghost.results --data $(notdir $(DATA:/=))

clean: ## remove the environment (runs and results stay)
	rm -rf $(VENV)

# --require-hashes: what is installed is what was locked, or nothing.
$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	touch $@
