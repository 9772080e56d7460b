# make demo    install, run the quickstart sweep, analyze it: tables, figures and a report in some minutes
# make test    install, then lint, type check and all tests
# make lint    ruff and mypy alone
# make bench   speed and memory beside other tools; writes benchmarks/results/*.json
# make paper   published figures made again small, beside what the papers report: one page; some minutes a paper
# make campaign MINUTES=60   random kills and damaged files (tests/campaign/README.md); not a part of `make test`
# make clean   remove the virtual environment and what tools have cached; results stay
#
# Set-up is pip in a virtual environment, and repeated only when pyproject.toml or constraints.txt has changed.

PYTHON ?= python3
VENV ?= .venv
RESULTS ?= results
MINUTES ?= 60
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile -c constraints.txt
# On every core; pip would compile on one alone. Left out is what is mostly never imported, half of it all.
SELDOM := tests?|testing|models|onnx|pipelines|modular_pipelines|_inductor|chardet|databricks|debugpy|fastapi|grpc|lm_eval|mlflow|mypyc?|networkx|nltk|opentelemetry|pip|pygments|setuptools|sklearn|torchgen|trl|wandb|wcwidth
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/($(SELDOM))/' $(VENV)/lib || true

.PHONY: help demo paper test suite lint bench campaign clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	$(BIN)/lorabench run sweeps/quickstart.toml --results $(RESULTS)
	$(BIN)/lorabench analyze $(RESULTS) quickstart
	@echo
	@echo "Tables:  $(RESULTS)/quickstart/tables/   (csv, md, tex)"
	@echo "Figures: $(RESULTS)/quickstart/figures/  (pdf, png)"
	@echo "Report:  $(RESULTS)/quickstart/report.html"

# A sweep whose runs did not all end well is on the page too, and says so.
paper: $(VENV)/.installed
	@code=0; for sweep in sweeps/paper/small/*.toml; do \
		$(BIN)/lorabench run $$sweep --results $(RESULTS) || code=$$?; done; \
	$(BIN)/lorabench paper $(RESULTS) sweeps/paper/small/*.toml && exit $$code

test: $(VENV)/.installed-dev
	$(MAKE) -j2 lint suite

# Where Python is told to write no bytecode, each of the tests' hundreds of processes would compile all sources anew, and
# each of pytest's workers what it makes of the tests' assertions.
# Two workers more than cores: the tests on a real SLURM, and of what several processes say to each other, mostly wait.
suite: $(VENV)/.installed-dev
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m compileall -q lorabench tests
	env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$($(BIN)/python -c 'import os; print(os.cpu_count() + 2)') --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(PIP) -e ".[bench]"
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/vision.py
	$(BIN)/python benchmarks/grid.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/analysis.py
	$(BIN)/python benchmarks/weights.py
	$(BIN)/python benchmarks/ensemble.py
	$(BIN)/python benchmarks/merging.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/cluster.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/plan.py

campaign: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign --minutes $(MINUTES)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lorabench tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Editable, so that what runs is this checkout and its commit goes into every record.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e .
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e ".[dev]"
	@$(COMPILE)
	@touch $@ $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "lorabench needs Python 3.11 or later, and '$(PYTHON)' is not: name another, as in make PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
