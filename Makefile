# `make boot` and `make test` need only Python 3.11 and make: tools/setup.sh brings the rest.

in_venv = .venv/bin/python -m

.DEFAULT_GOAL := help
.PHONY: help build boot test lab lab-shell lint types guests bench clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 10

build: ## make .venv and build the extension, if anything has changed
	@tools/setup.sh

boot: build ## boot the first guest
	$(in_venv) pykvm boot guests/hello.bin

test: build ## run the whole test suite
	$(in_venv) pytest

lab: ## run the tests on a real AMD-V, inside QEMU: ARGS="-k timer", or RUN=benchmarks/exits.py instead
	@tools/lab/lab.py $(if $(RUN),run $(RUN),test) $(ARGS)

lab-shell: ## open a shell there
	@tools/lab/lab.py shell

lint: build ## check style and formatting
	$(in_venv) ruff check
	$(in_venv) ruff format --check

types: build ## check the types, and the extension against its stubs
	$(in_venv) mypy
	$(in_venv) mypy.stubtest pykvm._kvm pykvm.device

guests: ## assemble the guests again (needs binutils)
	$(MAKE) -C guests

bench: build ## run every benchmark
	@for script in $(filter-out %/common.py,$(wildcard benchmarks/*.py)); do \
	    echo "$$script"; .venv/bin/python "$$script" || exit; done

clean: ## remove everything that was made, .venv included
	rm -rf .venv build dist *.egg-info ext/pykvm/*.c pykvm/*.so pykvm/*.pxd benchmarks/build
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pykvm tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
