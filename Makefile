# Everything a fresh machine needs: Python 3.11 or newer and a package index.
#   make demo    trains a small model on the built-in rooms and saves a picture of what it predicts
#   make test    runs all tests
#   make lint    ruff
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

export JAX_PLATFORMS ?= cpu
# TensorFlow, which SeqIO imports, prints its start-up notes otherwise.
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test test-fast lint setup clean

setup: $(READY)

$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fm4m needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[data,rooms,features,aot,dev]'
	@touch $(READY)

demo: $(READY)
	$(PY) -m data_pipelines.rooms.prepare --out=data/rooms
	$(PY) -m fm4m.train --config=configs/demo.py --workdir=runs/demo

# One process a core, since most of a test's time is compilation on one; a file stays in one process, because its tests
# share fixtures.
PYTEST := $(PY) -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile --durations=20

test: $(READY)
	$(PYTEST)

test-fast: $(READY)
	$(PYTEST) -m 'not slow'

lint: $(READY)
	$(PY) -m ruff check .

clean:
	rm -rf $(VENV) data runs .cache
