# Two commands for a fresh machine: `make train` and `make test`. Both build the environment first.
# Needs Python 3.11 to 3.14, git and make. `make help` lists the targets.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
	>/dev/null 2>&1 && echo $$p && break; done)
# Extra pip arguments for torch alone, for instance an index with CPU builds: make env TORCH_ARGS="--index-url URL"
TORCH_ARGS ?=
# Parameters of `make train`, in papermill's form: make train ARGS="-p strategy c -p epochs 4"
ARGS ?=

# Torch's threads spin while they wait, which a busy machine pays dearly; the package sets this too, but torch may be imported first.
export OMP_WAIT_POLICY ?= PASSIVE

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help env system lab train test test-slow gpu-check browser-test guide notebooks wheel torture newcomer test-matrix coverage clean

help:
	@echo "make env     create $(VENV) with the tested versions (and system packages where root may install them)"
	@echo "make train   env, vggt_lora_doctor, then the main job: nbs/03_train.ipynb by papermill, results in outputs/"
	@echo "make lab     env, then JupyterLab on a working copy of the numbered notebooks in outputs/lab"
	@echo "make test    env, then the export check, nbdev_test, the numbered notebooks made small, and pytest without what proves hardening"
	@echo "make test-slow   env, then the rest of pytest: attacks, kills, two processes, a stand-in for a GPU, a real browser"
	@echo "make gpu-check   env, then in ten minutes what only a GPU can show, on its stand-in where there is none; the page is outputs/gpu-check/"
	@echo "make browser-test   env, then the numbered notebooks in a real JupyterLab and Chromium; screenshots in outputs/browser/"
	@echo "make guide   env, then nbs/guide and the numbered notebooks as static pages in _docs/"
	@echo "make notebooks   env, then every notebook executed in place, text and small pictures kept; one: make notebooks NOTEBOOKS=03_train"
	@echo "make wheel   env, then dist/: the source distribution and the wheel, with the weights of the tiny network inside"
	@echo "make torture      env, then every command killed, at 100 random instants and before about 200 writes in all; the result goes to docs/torture.md"
	@echo "make newcomer     all that the README tells a newcomer, on a fresh clone, timed; the log goes to docs/newcomer.md"
	@echo "make test-matrix  the quick tests with each Python from 3.11 to 3.14 that is here, pinned and lowest versions, each in an environment of its own"
	@echo "make coverage     env, then pytest and the chapters with the lines of the package that they run; fails below 90 %; outputs/coverage.md is the table"
	@echo "make system  only the system packages that Open3D and the browser check need"
	@echo "make clean   remove $(VENV) and build leftovers; outputs/ stays"

env: system $(STAMP)

system:
	@sh tools/system_packages.sh

$(STAMP): settings.ini setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "make env: no Python 3.11 to 3.14 with venv was found (on Debian also install python3-venv); name one: make env PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt $(TORCH_ARGS) torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) check
	$(BIN)/nbdev_export --help >/dev/null
	$(BIN)/python tools/lab.py --settings
	@touch $(STAMP)

# Options of jupyter lab: make lab LAB="--no-browser --port 9999"
LAB ?=
lab: env
	$(BIN)/python tools/lab.py $(LAB)

train: env
	@mkdir -p outputs
	$(BIN)/vggt_lora_doctor --papermill $(ARGS)
	$(BIN)/papermill nbs/03_train.ipynb outputs/03_train.ipynb --no-progress-bar --stdout-file - $(ARGS) </dev/null

test: env
	$(BIN)/python tests/run_all.py

test-slow: env
	$(BIN)/python tests/run_all.py --slow

# make gpu-check GPU_CHECK="--only kernels,steps"
GPU_CHECK ?=
gpu-check: env
	$(BIN)/python tools/gpu_check.py $(GPU_CHECK)

# Part of `make test-slow` where Chromium is installed; here its absence is a fault, and says how to get it.
browser-test: env
	@$(BIN)/python -c "import sys; sys.path.insert(0, 'tests'); import browser; sys.exit(browser.what_is_missing())"
	$(BIN)/python -m pytest -q -rs tests/test_browser_notebooks.py tests/test_browser_cloud.py

guide: env
	$(BIN)/python tools/render_guide.py

# The first line is all; with --check nothing is written, and stale outputs are a fault: make notebooks NOTEBOOKS="--check"
NOTEBOOKS ?=
notebooks: env
	$(BIN)/python tools/execute_notebooks.py $(NOTEBOOKS)

# The wheel is made from the source distribution, so what is missing in one cannot hide in the other.
wheel: env
	$(BIN)/python -m build --no-isolation --outdir dist .

torture: env
	$(BIN)/python -m tests.torture --write docs/torture.md

# Of what is committed. Goes on where it broke off, if it is given a folder: make newcomer NEWCOMER="--folder PATH"
NEWCOMER ?=
newcomer:
	TORCH_ARGS="$(TORCH_ARGS)" $(PYTHON) tools/newcomer.py $(NEWCOMER)

test-matrix:
	$(PYTHON) tools/test_matrix.py

# Processes that tests start are counted too, and the chapters' own checks. The table goes to outputs/coverage.md.
coverage: env
	$(BIN)/python -m coverage erase
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -q -n 2 --dist loadfile tests
	$(BIN)/python -m coverage run tools/run_chapters.py
	$(BIN)/python -m coverage combine -q
	@printf '# Coverage\n\nWritten by `make coverage`: lines that pytest and the chapters run; what is left out is in `.coveragerc`.\n\n' >outputs/coverage.md
	$(BIN)/python -m coverage report --skip-covered --show-missing --fail-under=90 --format=markdown >>outputs/coverage.md

clean:
	rm -rf $(VENV) build dist *.egg-info
