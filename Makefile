# Targets for people; `make help` lists them. Needs Python 3.11+ with venv and headers, a C++ compiler, git and a package index.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= jobs/recipes/demo.toml
BENCH ?= quantize
export PATH := $(CURDIR)/$(BIN):$(PATH)
export RAY_DS_CLUSTER_DIR ?= $(CURDIR)/.cluster
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-elastic test soak check fmt bench up down clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## install exact versions into .venv and build DeepSpeed's CPU communication op

$(VENV)/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	DS_ACCELERATOR=cpu $(BIN)/python -m ray_ds.train.zero.build
	touch $@

demo: up  ## raw text to a served INT8 model: runs the recipe as Ray jobs on a local cluster, asks a question
	@source $(RAY_DS_CLUSTER_DIR)/env && ray-ds sample-text runs/sample_text && ray-ds run $(RECIPE)
	@echo "cluster and endpoint stay up; ask with: ray-ds generate 'In the beginning'; stop with: make down"

demo-elastic: up  ## train while nodes are killed, join and drain, and once undisturbed; compare the loss curves
	@source $(RAY_DS_CLUSTER_DIR)/env && python -m jobs.bench.demo_elastic

test: setup  ## run all tests (needs redis-server, prometheus, nodejs, iproute2: .ci/install-tools)
	python -m pytest

soak: setup  ## run the long kill-and-resume tests
	python -m pytest -m soak

check: setup  ## ruff, ruff format and mypy strict
	ruff check .
	ruff format --check .
	mypy

fmt: setup  ## format and fix what can be fixed
	ruff format .
	ruff check --fix .

bench: setup  ## run one benchmark: make bench BENCH=train
	python -m jobs.bench.$(BENCH)

up: setup  ## start the local three-node cluster
	@cluster/local/up.sh

down:  ## end the processes that `make up` started, and no others
	@cluster/local/down.sh

clean: down  ## remove runs, caches and the environment
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info $(VENV)
	find . -name __pycache__ -prune -exec rm -rf {} +
