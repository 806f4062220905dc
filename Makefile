# make demo: set up, train a small Lynx on real images, test and draw it.   make test: set up and run every check.
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo grpo-demo test test-families bench cuda fuzz kernel-table lint format clean

# Threads that wait spin for microseconds only, then sleep: where anything else runs beside them, training by threads
# that spin on was measured five times as slow; by threads that sleep at once it is nearly half as fast on a free machine.
demo: .venv/demo-installed
	GOMP_SPINCOUNT=10000 $(BIN)/lynx demo

# A small model learns to add handwritten digits from rewards alone, some minutes on 2 cores; draws grpo_demo.svg.
grpo-demo: .venv/demo-installed .venv/trl-installed
	$(BIN)/python -m examples.grpo_demo

# Triton's interpreter needs processes of its own. Two pytest processes of one thread each: more threads than cores make every one of them wait.
test: .venv/test-installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 tests/interpreter

# Every family of transformers' models under our attention: tests/families.json, and from it the tables of
# docs/use-it-in-your-model.md. Some minutes.
test-families: .venv/test-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families

# Everything that fits this machine into benchmarks/results/ (kept if stopped), then benchmarks/report/, docs/benchmarks.md
# and the README's table from all that is stored. 20 minutes or so on 2 cores.
bench: .venv/test-installed
	$(BIN)/python -m benchmarks all
	$(BIN)/python -m benchmarks report

# The CUDA kernels for all GPUs that they are written for, which takes nvcc but no GPU; where they lie is what is printed.
cuda: .venv/test-installed
	$(BIN)/python -m lynx_kernels.backends.cuda_build

# Random calls of the C++ in csrc under AddressSanitizer and UBSan, for a minute.
fuzz: .venv/test-installed
	$(BIN)/python tests/csrc/fuzz.py 60

# What the compiler makes of every Triton launch, for GPUs that need not be there: tests/compilation/compiled.csv, which
# the tests read, and build/kernels.md, which you can. Only what has changed is compiled.
kernel-table: .venv/test-installed
	$(BIN)/python -m tests.compilation.table

lint: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build benchmarks/report *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/%-installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv (some minutes the first time)"
	$(INSTALL) --editable '.[$*]'
	@touch $@
