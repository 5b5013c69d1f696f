# Everything sets itself up: Python 3.11+, make, and (for speed) a C++ compiler are all it takes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT ?= runs/demo
# Images of containers often set it. Without bytecode each process that trains compiles torch and transformers anew: 13 s to start, not 5.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check matrix format bench bench-parity bench-kernels bench-train bench-train-real bench-preference bench-experts bench-parallel bench-decode bench-quality bench-codecs bench-gptq bench-chats bench-memory bench-plan bench-paging bench-merge bench-latency bench-dropin bench-serve bench-prefix bench-soak gpu study models faults new-user readme release clean

demo: $(VENV)/.ready  ## set up, then compare LoRA and QLoRA on the embedded model and data
	$(BIN)/lownibble compare --output $(OUTPUT) --resume

test: $(VENV)/.ready-dev  ## set up, then run the tests that are quick: six or seven minutes on two cores
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

check: $(VENV)/.ready-dev  ## format, lint, types, every test; at the end which are the slowest
	$(BIN)/ruff format --check src tests setup.py tools
	$(BIN)/ruff check src tests setup.py tools
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist worksteal --durations=25

matrix:  ## every Python, the scalar kernels, the lowest and the newest versions of libraries: make matrix ROWS="--rows scalar --select tests/kernels"
	$(PYTHON) tools/matrix.py $(ROWS)

format: $(VENV)/.ready-dev
	$(BIN)/ruff format src tests setup.py tools
	$(BIN)/ruff check --fix src tests setup.py tools

bench: bench-parity bench-kernels bench-train bench-decode  ## measure again what the README shows

bench-parity: $(VENV)/.ready-dev
	$(BIN)/lownibble bench parity --peers --output benchmarks/results/parity-cpu.json

bench-kernels: $(VENV)/.ready-dev
	$(BIN)/lownibble bench kernels --peers --output benchmarks/results/kernels-cpu.json

bench-train: $(VENV)/.ready-dev
	$(BIN)/lownibble bench train --peers --output benchmarks/results/train-cpu.json

bench-train-real: $(VENV)/.ready-dev  ## real rows of messages: make bench-train-real DATA=rows.jsonl
	$(BIN)/lownibble bench train --peers --data $(DATA) --output benchmarks/results/train-real-cpu.json

bench-preference: $(VENV)/.ready-dev
	$(BIN)/lownibble bench preference --peers --output benchmarks/results/preference-cpu.json

bench-experts: $(VENV)/.ready-dev  ## needs 20 GB of memory
	$(BIN)/lownibble bench experts --peers --output benchmarks/results/experts-cpu.json

bench-parallel: $(VENV)/.ready-dev
	$(BIN)/lownibble bench parallel --output benchmarks/results/parallel-cpu.json

bench-decode: $(VENV)/.ready-dev
	$(BIN)/lownibble bench decode --peers --output benchmarks/results/decode-cpu.json

bench-quality: $(VENV)/.ready-dev  ## about an hour: make bench-quality DATA=nli/ (premise, hypothesis, label)
	$(BIN)/lownibble bench quality --data $(DATA) --output benchmarks/results/quality-cpu.json

bench-codecs: $(VENV)/.ready-dev
	$(BIN)/lownibble bench codecs --output benchmarks/results/codecs-cpu.json

bench-gptq: $(VENV)/.ready-dev  ## a quarter of an hour
	$(BIN)/lownibble bench gptq --output benchmarks/results/gptq-cpu.json

bench-chats: $(VENV)/.ready-dev
	$(BIN)/lownibble bench chats --peers --output benchmarks/results/chats-cpu.json

bench-memory: $(VENV)/.ready-dev
	$(BIN)/lownibble bench memory --output benchmarks/results/memory-cpu.json

bench-plan: $(VENV)/.ready-dev
	$(BIN)/lownibble bench plan --output benchmarks/results/plan-cpu.json

bench-paging: $(VENV)/.ready-dev
	$(BIN)/lownibble bench paging --output benchmarks/results/paging-cpu.json

bench-merge: $(VENV)/.ready-dev
	$(BIN)/lownibble bench merge --output benchmarks/results/merge-cpu.json

bench-latency: $(VENV)/.ready-dev
	$(BIN)/lownibble bench latency --peers --output benchmarks/results/latency-cpu.json

bench-dropin: $(VENV)/.ready-dev
	$(BIN)/lownibble bench dropin --peers --output benchmarks/results/dropin-cpu.json

bench-serve: $(VENV)/.ready-dev
	$(BIN)/lownibble bench serve --peers --output benchmarks/results/serve-cpu.json

bench-prefix: $(VENV)/.ready-dev
	$(BIN)/lownibble bench prefix --output benchmarks/results/prefix-cpu.json

bench-soak: $(VENV)/.ready-dev  ## a quarter of an hour and 11 GB of disk
	$(BIN)/lownibble bench soak --output benchmarks/results/soak-cpu.json

gpu: $(VENV)/.ready-dev  ## on a machine with a CUDA device, eight minutes: every record that there is for one
	$(BIN)/lownibble bench gpu --peers --output benchmarks/results

study: $(VENV)/.ready-dev  ## what is missing of the articles' study (hours), and its report in docs/
	$(BIN)/lownibble study run studies/articles.toml --output studies/articles
	$(BIN)/lownibble study report studies/articles --output docs/study

models: $(VENV)/.ready-dev  ## half an hour: every causal architecture of transformers against the record of them
	$(BIN)/python tests/models/sweep.py --check

faults: $(VENV)/.ready-dev  ## kill, fill, damage and starve training runs, and record what becomes of them
	$(BIN)/python tests/faults/harness.py --output benchmarks/results/faults-cpu.json

new-user: $(VENV)/.ready-dev  ## from pip install to a chat with an adapter of one's own, through the page: after make release
	$(BIN)/python tests/studio/new_user.py dist/*.whl --output benchmarks/results/new-user-cpu.json

readme: $(VENV)/.ready-dev  ## render the recorded figures in README.md and docs/
	$(BIN)/python tools/readme.py

release: $(VENV)/.ready-dev  ## build sdist and wheel into dist/ and check them (docs/release.md): make release RELEASE=--rehearsal
	$(BIN)/python tools/release.py $(RELEASE)

$(VENV)/.ready: pyproject.toml setup.py constraints.txt tools/install.py $(wildcard src/lownibble/kernels/native/*)
	$(PYTHON) tools/install.py $(VENV)
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PYTHON) tools/install.py $(VENV) --dev
	@touch $@

clean:
	rm -rf $(VENV) .cache/matrix build dist src/*.egg-info src/lownibble/kernels/_native*
