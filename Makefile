# One command each. `make run` and `make test` set everything up first; the second time they start at once.
VENV_PYTHON := .venv/bin/python
READY := .venv/.ready
SETUP_FILES := requirements.txt requirements-cluster.txt requirements-dev.txt constraints.txt pyproject.toml scripts/setup.sh
# One thread a process: two that wait for each other on two cores take minutes instead of seconds.
PYTEST := OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest --durations=10
ROOT_FLAG := $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help setup run notebooks refresh test test-slow test-gpu test-clients lint lab kernel bench nano clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# An environment belongs to the folder it was made in: a copied or moved project makes its own.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

$(READY): $(SETUP_FILES) $(VENV_PYTHON)
	@bash scripts/setup.sh

# A missing interpreter (another image under the same data disk) sends the environment back to set-up.
$(VENV_PYTHON): ;

setup: $(READY) ## make .venv, or bring it up to date

run: $(READY) ## run every notebook on CharacterGLM-Nano
	$(VENV_PYTHON) -m helpers run --model $(or $(MODEL),nano)

notebooks: $(READY) ## run every notebook on the model that fits this machine, or: make notebooks MODEL=6b
	$(VENV_PYTHON) -m helpers run --model $(or $(MODEL),auto)

refresh: $(READY) ## run on nano and keep the outputs in notebooks/, ready for git
	$(VENV_PYTHON) -m helpers refresh

test: $(READY) lint ## what must pass before a commit: linter, unit, notebook and browser tests, in two processes
	@bash scripts/get_browser.sh
	$(PYTEST) -n 2 --dist loadscope --no-loadscope-reorder -m "not slow"

# The browser and what it shows need both cores: beside another process, clicks and answers come seconds late.
test-slow: $(READY) ## the rest: real compilers, killed processes, several processes, fresh environments
	@bash scripts/get_browser.sh
	$(PYTEST) -m "slow and browser"
	$(PYTEST) -n 2 --dist loadscope --no-loadscope-reorder -m "slow and not browser"

test-gpu: $(READY) ## on a CUDA GPU: the notebooks, and the figures of the 6B into benchmarks/results/
	$(VENV_PYTHON) -m pytest tests/gpu -m gpu -s

test-clients: $(READY) ## real clients from pip and npm, SillyTavern and axe-core among them, against server and page; needs Node
	@bash scripts/get_browser.sh
	$(VENV_PYTHON) tests/clients/accessibility.py
	$(VENV_PYTHON) tests/clients/real_clients.py

lint: $(READY) ## ruff
	$(VENV_PYTHON) -m ruff check .

lab: $(READY) ## JupyterLab on 127.0.0.1 with a kernel that has everything
	JUPYTER_CONFIG_PATH="$(CURDIR)/scripts/jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
	$(VENV_PYTHON) -m jupyterlab --ServerApp.ip=127.0.0.1 $(ROOT_FLAG) \
		--LabApp.default_url=/lab/tree/notebooks

kernel: $(READY) ## add the kernel "characterglm" to a JupyterLab that is already running
	$(VENV_PYTHON) -m ipykernel install --user --name characterglm --display-name "Python 3 (CharacterGLM)"

bench: $(READY) ## every benchmark, short, and its figures in benchmarks/README.md: about 10 minutes on two quiet cores
	$(VENV_PYTHON) benchmarks/run_all.py

nano: $(READY) ## train CharacterGLM-Nano again: see the training row of data/nano/README.md for the time
	PYTHONPATH=scripts $(VENV_PYTHON) -m nano.build

clean: ## remove .venv and caches; outputs/ and models/ stay
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
