# make demo | make test | make check | make bench | make docs   (each creates .venv when it is missing)
# make notebooks | make lock   (run the notebooks again; write requirements.lock again)
# make gpu-check PYTHON=python3   (installs nothing; measures on a GPU, in six minutes)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test test-slow style check bench docs notebooks lock gpu-check clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# torch comes first and pinned: a CPU build is taken where one is offered.
$(STAMP): setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/vae3d demo-data data/demo
	$(BIN)/python train_3d.py --config configs/train/demo.yaml --data.root data/demo --out_dir runs/demo
	$(BIN)/python evaluate.py --checkpoint runs/demo --data.root data/demo --mode patch --overlap 0.25 --out_dir runs/demo/evaluation

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not slow and not gpu'

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'slow and not gpu'

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/test_types.py

check: style test

bench: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	for b in $(filter-out benchmarks/gpu.py benchmarks/latents.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$b || exit 1; done

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html is the first page; its search needs: $(BIN)/python -m http.server -d build/site"

# Of setup.cfg and constraints.txt, for every system and Python that setup.cfg admits.
lock: $(STAMP)
	$(BIN)/uv pip compile setup.cfg --extra demo --extra formats --extra blosc2 --extra tensorboard \
	  --constraint constraints.txt --universal --generate-hashes --no-emit-index-url --no-annotate --quiet \
	  --default-index https://pypi.org/simple --custom-compile-command 'make lock' --output-file requirements.lock

# Of what `make demo` made; their outputs are kept.
notebooks: $(STAMP)
	$(BIN)/python docs/notebooks.py

# With the Python that is there, since a GPU's torch is rarely to be replaced.
gpu-check:
	$(PYTHON) benchmarks/gpu.py --out $(or $(OUT),.)/gpu_check.md

clean:
	rm -rf $(VENV) build *.egg-info
