# Set-up, the demo and the checks. `make demo` and `make test` set the environment up by themselves.
PYTHON ?= python3
UV_VERSION := 0.13.9
TOOLS := .tools
BIN := .venv/bin
READY := .venv/.ready

# A mirror that is configured for pip is used by uv too.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
export PYTHONUTF8 = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types imports lock format

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## build .venv from requirements.lock (the other targets do it when needed)

# `uv` from PATH, else its pinned release in $(TOOLS): in an environment of its own, or beside pip where venv is missing.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ScanScribe needs Python 3.11 or newer; name one with: make setup PYTHON=python3.12" >&2; exit 2; }
	@echo "Setting up .venv: a few minutes, most of it for torch."
	@set -e; \
	if command -v uv >/dev/null; then uv=uv; else uv=$(TOOLS)/bin/uv; fi; \
	if [ "$$uv" != uv ] && [ ! -x "$$uv" ]; then \
	  rm -rf $(TOOLS); \
	  if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    $(PYTHON) -m venv $(TOOLS); $(TOOLS)/bin/python -m pip install --quiet uv==$(UV_VERSION); \
	  elif $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	    $(PYTHON) -m pip install --quiet --target $(TOOLS) uv==$(UV_VERSION); \
	  else \
	    echo "This python3 has neither venv nor pip. Install one of them (Debian, Ubuntu: apt-get install python3-venv)," >&2; \
	    echo "or put uv on the PATH, then run make again." >&2; exit 2; \
	  fi; \
	fi; \
	"$$uv" venv --quiet --clear --no-python-downloads --python "$$(command -v $(PYTHON))" .venv; \
	export VIRTUAL_ENV=$(CURDIR)/.venv; \
	"$$uv" pip sync --require-hashes --compile-bytecode requirements.lock; \
	"$$uv" pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY) ## read the sample inputs through the batch flow; two are refused on purpose
	@rm -f demo-out/index.html; \
	$(BIN)/scanscribe batch $$($(BIN)/python examples/paths.py) --reference examples/golden --out demo-out; code=$$?; \
	if [ $$code -eq 1 ] && [ -f demo-out/index.html ] && [ "$$(grep -c . demo-out/rejected.jsonl)" = 2 ] \
	  && [ "$$(grep -cE 'broken/(truncated\.png|not-an-image\.jpg)"' demo-out/rejected.jsonl)" = 2 ]; then \
	  echo "The samples in examples/broken are refused on purpose."; \
	else \
	  echo "The demo failed (exit code $$code): see above, then run .venv/bin/scanscribe doctor." >&2; exit 1; \
	fi

test: $(READY) ## run the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY) ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## put the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## type hints
	$(BIN)/mypy

imports: $(READY) ## who may import whom
	$(BIN)/lint-imports

lock: ## resolve requirements.lock anew (needs uv)
	@command -v uv >/dev/null && uv=uv || uv=$(TOOLS)/bin/uv; \
	"$$uv" pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 --group dev \
	  --custom-compile-command "make lock" --constraints constraints.txt pyproject.toml --output-file requirements.lock
