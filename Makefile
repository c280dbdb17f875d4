# `make help` lists the targets. `make pretrain` and `make test` need only Python >= 3.10 and make: they create .venv
# and install into it first. A second call installs nothing.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
NPROC ?= 2

# On Linux pip takes a torch with CUDA, several GB. A machine without a GPU can do with PyTorch's CPU packages:
# set TORCH_INDEX_URL to their index (README.md, "Installing") and pip looks there too.
TORCH_INDEX_URL ?=

RUN := $(VENV)/bin/python
PIP_INSTALL = $(RUN) -m pip install -c constraints.txt $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help venv install install-dev pretrain pretrain-deepspeed test test-slow test-all test-image image-verified test-torchtitan test-gpu bench-cpu bench-gpu lint format types docs image constraints clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  ARGS='...' is passed on to pytest and to launch/pretrain.py; NPROC=2 is the number of training processes."
	@echo "  PYTHON=python3 is the interpreter behind .venv, and the one test-gpu runs with."

$(RUN):
	@.ci/venv "$(PYTHON)" "$(VENV)"

$(INSTALLED): pyproject.toml constraints.txt | $(RUN)
	$(PIP_INSTALL) -e '.[train,test,deepspeed]'
	@touch $@

$(INSTALLED_DEV): pyproject.toml constraints.txt | $(INSTALLED)
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

venv: $(RUN)  ## create .venv, empty

install: $(INSTALLED)  ## .venv with the package (editable), training and test dependencies

install-dev: $(INSTALLED_DEV)  ## the same with ruff, mypy, shellcheck, hadolint, pre-commit and mkdocs

# Two processes on one machine share its cores.
THREADS := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( $$(nproc) > $(NPROC) ? $$(nproc) / $(NPROC) : 1 ))}

pretrain: $(INSTALLED)  ## train a small Llama on two FSDP2 ranks with LDAdamW
	$(THREADS) $(VENV)/bin/torchrun --standalone --nproc-per-node $(NPROC) \
	    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
	    launch/pretrain.py --config configs/pretrain/default.yaml $(ARGS)

# --num_gpus is the number of processes, on a machine without GPUs too.
pretrain-deepspeed: $(INSTALLED)  ## the same under DeepSpeed, on two ZeRO-2 ranks
	$(THREADS) $(VENV)/bin/deepspeed --log_level warning --num_gpus $(NPROC) \
	    launch/pretrain.py --config configs/pretrain/default.yaml --deepspeed configs/deepspeed/zero2.json $(ARGS)

test: $(INSTALLED)  ## the test suite, without what is marked slow
	$(RUN) -m pytest $(ARGS)

# torchtitan's requirements contradict constraints.txt, so it has an environment of its own. TITAN_TORCH=2.15.0 runs what
# it does not do with the torch of constraints.txt.
TITAN_VENV ?= .venv-torchtitan
TITAN_TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
TITAN_INSTALLED := $(TITAN_VENV)/.installed-$(TITAN_TORCH)

$(TITAN_INSTALLED): pyproject.toml
	@.ci/venv "$(PYTHON)" "$(TITAN_VENV)"
	$(TITAN_VENV)/bin/python -m pip install $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) \
	    torch==$(TITAN_TORCH) torchtitan==0.3.0 triton pytest -e .
	@touch $@

test-torchtitan: $(TITAN_INSTALLED)  ## the tests with torchtitan (Python >= 3.11), in an environment of its own
	$(TITAN_VENV)/bin/python -m pytest tests/test_torchtitan.py $(ARGS)

test-slow: $(INSTALLED)  ## the tests marked slow
	$(RUN) -m pytest -m "slow and not exhaustive" $(ARGS)

test-all: $(INSTALLED)  ## every test: also full products of options, long runs and the image, in about two hours
	$(RUN) -m pytest -m "slow or not slow" $(ARGS)

# tests/image.sha256 says of which files the image was last built and run; .ci/run does it again when they have changed.
IMAGE_FILES := docker/Dockerfile docker/entrypoint.sh constraints.txt tests/docker_image.py
test-image: $(INSTALLED)  ## docker/Dockerfile built, run and checked, if its files changed since that was last done
	@sha256sum --check --status tests/image.sha256 && echo "the image was built and run with these files: not done again" \
	    || $(RUN) -m pytest -m exhaustive tests/test_docker.py $(ARGS)

image-verified:  ## note that `make test-image` has passed, and was not skipped, with the files as they are
	sha256sum $(IMAGE_FILES) > tests/image.sha256

# Any interpreter that has torch >= 2.7, transformers and pytest; installs nothing. The versions found there are not
# those of constraints.txt, so their deprecation warnings are shown, not raised. tests/launch needs more to be read.
test-gpu:  ## the tests marked gpu, with PYTHON as it is
	$(PYTHON) -m pytest -m gpu -W default --ignore tests/launch tests $(ARGS)

# BENCH_ARGS='--scale 32' RANKS='4 8' are for a look at whether everything runs: on a small model, DEVICE=cpu for bench-gpu.
BENCH_ARGS ?=
DEVICE ?= cuda
BENCH_CPU := runs/bench/cpu
BENCH_GPU := runs/bench/gpu

bench-cpu: RANKS ?= 16 128
bench-cpu: $(INSTALLED)  ## all benchmarks on the CPU, in ten minutes on two cores, to runs/bench/cpu
	$(RUN) benchmarks/step_time.py --device cpu --ranks $(RANKS) --steps 20 --out $(BENCH_CPU) $(BENCH_ARGS)
	$(RUN) benchmarks/first_step.py --device cpu --scale 4 --ranks $(RANKS) --out $(BENCH_CPU) $(BENCH_ARGS)
	$(RUN) benchmarks/memory.py --device cpu --ranks $(lastword $(RANKS)) --out $(BENCH_CPU) $(BENCH_ARGS)
	$(RUN) benchmarks/scaling.py --rank $(lastword $(RANKS)) --out $(BENCH_CPU) $(BENCH_ARGS)
	$(RUN) benchmarks/where_time_goes.py --device cpu --rank $(lastword $(RANKS)) --out $(BENCH_CPU) $(BENCH_ARGS)
	$(RUN) benchmarks/wire.py --out $(BENCH_CPU)

# Like test-gpu with any interpreter that has torch >= 2.7 and transformers; other projects' optimizers if they are there.
# Eight of the 24 layers of the 1B model have its shapes, and leave memory for all that step in turn.
STEP_TIME = $(PYTHON) benchmarks/step_time.py --device $(DEVICE) --ranks $(RANKS) --steps 10 --warmup 3
bench-gpu: RANKS ?= 32 256
bench-gpu:  ## benchmarks for one GPU, in ten minutes, to runs/bench/gpu
	$(STEP_TIME) --model llama-1b --layers 8 --dtype bfloat16 --out $(BENCH_GPU)/1b-bfloat16 $(BENCH_ARGS)
	$(STEP_TIME) --model llama-1b --layers 8 --dtype float32 --out $(BENCH_GPU)/1b-float32 $(BENCH_ARGS)
	$(STEP_TIME) --model 7b-layer --dtype bfloat16 --out $(BENCH_GPU)/7b-layer-bfloat16 $(BENCH_ARGS)
	$(STEP_TIME) --model 7b-layer --dtype float32 --out $(BENCH_GPU)/7b-layer-float32 $(BENCH_ARGS)
	$(PYTHON) benchmarks/memory.py --device $(DEVICE) --model llama-1b --dtype bfloat16 --ranks $(lastword $(RANKS)) \
	    --out $(BENCH_GPU) $(BENCH_ARGS)
	$(PYTHON) benchmarks/first_step.py --device $(DEVICE) --ranks $(RANKS) --out $(BENCH_GPU) $(BENCH_ARGS)
	$(PYTHON) benchmarks/where_time_goes.py --device $(DEVICE) --model llama-1b --layers 8 \
	    --rank $(lastword $(RANKS)) --out $(BENCH_GPU) $(BENCH_ARGS)

lint: $(INSTALLED_DEV)  ## ruff, shellcheck for the scripts, hadolint for docker/Dockerfile
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/shellcheck -x launch/*.sh launch/slurm.sbatch docker/entrypoint.sh
	$(VENV)/bin/hadolint docker/Dockerfile

format: $(INSTALLED_DEV)  ## let ruff fix and format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(INSTALLED_DEV)  ## mypy, strict on ldadam_dist
	$(RUN) -m mypy

docs: $(INSTALLED_DEV)  ## the documentation as a site, in site/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# ENGINE: docker, or what has the same options: podman, buildah.
ENGINE ?= docker
image:  ## docker/Dockerfile as the image ldadam-dist; with TORCH_INDEX_URL for CPUs
	$(ENGINE) build --tag ldadam-dist --file docker/Dockerfile \
	    $(if $(TORCH_INDEX_URL),--build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL)) $(ARGS) .

# torch keeps its version: change its line first. It pins its CUDA packages itself, other builds of it pin others, so
# these are left out.
constraints: $(INSTALLED_DEV)  ## resolve constraints.txt anew, for every Python from 3.10 on
	$(RUN) -m pip install uv
	grep '^torch==' constraints.txt > $(VENV)/torch.txt
	{ grep '^#' constraints.txt; \
	  $(RUN) -m uv pip compile pyproject.toml --universal --all-extras --python-version 3.10 --no-python-downloads \
	      --constraint $(VENV)/torch.txt --no-header --no-annotate | grep -vE '^(nvidia|cuda|triton)'; } \
	    > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

clean:  ## remove .venv, caches and build outputs; runs are kept
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
