# make demo: the whole thing, on a real model and real text.   make test: everything that must hold.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint bench clean

demo: .venv/.ready
	$(BIN)/python examples/demo.py

test: .venv/.ready
	$(BIN)/pytest -m "not slow"

test-slow: .venv/.ready build/smollm2/manifest.json build/smollm2-fp32/manifest.json build/smollm2-int8/manifest.json
	$(BIN)/pytest -m slow

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.ready build/smollm2/manifest.json build/smollm2-int8/manifest.json
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/kill_revive.py
	$(BIN)/python benchmarks/device.py

build/smollm2/manifest.json: | .venv/.ready
	$(BIN)/dlora-export smollm2-135m --out build/smollm2

build/smollm2-fp32/manifest.json: | .venv/.ready
	$(BIN)/dlora-export smollm2-135m --out build/smollm2-fp32 --head-dtype fp32

build/smollm2-int8/manifest.json: | .venv/.ready
	$(BIN)/dlora-export smollm2-135m --out build/smollm2-int8 --head-dtype int8

# pip and not another installer: it takes torch builds that lie on disk. 25.1 brought --group.
.venv/.ready: pyproject.toml
	@echo "Setting up .venv (a few minutes the first time: torch, transformers, onnxruntime)"
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11 …"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[all]" --group dev
	@touch $@

clean:
	rm -rf build .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
