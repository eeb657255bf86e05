# make demo | make test | make check | make bench   (each creates .venv when it is missing)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test test-slow style check bench clean
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
	$(BIN)/python -m pytest -q -n 2 -m 'not slow and not gpu'

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m 'slow and not gpu'

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: style test

bench: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	for b in benchmarks/*.py; do $(BIN)/python $$b || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info
