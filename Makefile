# make setup | demo | test | check | lint | bench | bench-student | bench-teachers | gpu | cluster-up | cluster-down |
# clean, and for who maintains it: lock | check-lowest.
# Needs python3 >= 3.11 with its venv module, and nothing else; cluster-up brings Slurm itself where it is root.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup demo test check lint lock check-lowest bench bench-student bench-teachers gpu cluster-up
.PHONY: cluster-down clean

setup: $(READY)

# torch comes first and alone: the index then offers the wheel of this machine (a CPU wheel where there is no GPU).
$(READY): pyproject.toml constraints.txt
	@$(SHELL) .ci/python "$(PYTHON)" "$(VENV)"
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $(READY)

# On the cores, also where there are GPUs: its two ranks would need two, and its student is too small for them.
demo: $(READY)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m hpc_cpd.launch --stage all --config configs/quickstart.yaml --cluster local

# No GPU and one thread: the tests start ranks of their own, and threads of several ranks on few cores wait for each other.
# Two workers, a file to one of them: half of the time a test waits for Slurm, for a lease to run out, for a lost rank.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
# Three workers for the fast ones: many of them wait for processes, locks and leases.
FAST     := $(PARALLEL) -m "not ranks and not cluster and not slow" -n 3
test: $(READY)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

# What one runs while working: lint, types, and the tests that start no ranks and no cluster and are not slow; under
# three minutes.
check: lint
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Write constraints.txt again, with the newest versions that pyproject.toml admits; then: make check test.
# Hold one back with KEEP, for example make lock KEEP=torch==2.13.0. Nothing is installed.
lock: $(READY)
	$(PIP) --dry-run --ignore-installed --report $(VENV)/lock.json '.[dev]' $(KEEP)
	$(BIN)/python .ci/lock.py <$(VENV)/lock.json >constraints.txt

# The fast tests with the lowest versions that pyproject.toml admits, in an environment of their own. Old versions use what
# newer ones of their own requirements call deprecated.
LOWEST := $(VENV)/lowest
check-lowest:
	@$(SHELL) .ci/python "$(PYTHON)" "$(LOWEST)"
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[test]'
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest $(FAST) -W ignore::DeprecationWarning

bench: bench-student bench-teachers

# Half an hour on an idle machine: the student's engine against DeepSpeed's layer, DDP, other checkpoints, robomimic's
# layout and the plain ways. OUT=FOLDER keeps the figures there.
STUDENT_BENCHMARKS := mixture expert_curve student_step stage_step checkpoints windows dpp acting
bench-student: $(READY)
	set -e; for name in $(STUDENT_BENCHMARKS); do \
	  OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py $(if $(OUT),--json $(OUT)/$$name.json); \
	done

# Ten minutes, then up to two hours, on an idle machine: our simulator and our PPO against stock Meta-World's and the
# peers'. CLEANRL=PATH names ppo_continuous_action.py of a checkout of CleanRL.
bench-teachers: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/simulator.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/teachers.py $(if $(CLEANRL),--cleanrl $(CLEANRL))

# On a machine with a GPU, under nine minutes: the tests that need one, the quickstart, steps of the student as a share of
# the peak, DeepSpeed's layer beside ours, acting. Figures go to docs/gpu (OUT=FOLDER: there). Without a GPU it says so.
gpu: $(READY)
	@$(BIN)/python benchmarks/gpu.py $(if $(OUT),--out $(OUT))

# A private Slurm cluster on this machine, to try things on: eval "$(make -s cluster-up)"
cluster-up: $(READY)
	@$(BIN)/python -m tests.cluster.slurm_cluster up

cluster-down: $(READY)
	@$(BIN)/python -m tests.cluster.slurm_cluster down

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
