# Everything runs in .venv, made on first use from the pins in constraints.txt.
#   make reproduce [PROFILE=mini] [NB=safety] [SEEDS=3] [ARGS=...]   notebooks by papermill -> figures/<profile>, report
#   make test                                                        ruff, tests, every notebook at the smoke profile under nbval
#   make lab                                                         JupyterLab with the right kernel
PYTHON  ?= python3
PROFILE ?= mini
NB      ?=
SEEDS   ?=
ARGS    ?=
NAMES   := $(or $(NB),$(shell ls notebooks | sed -n 's/^[0-9]*_\(.*\)\.ipynb$$/\1/p'))
WORKERS ?= 2
BIN     := .venv/bin
# Metadata that Jupyter and papermill add.
UNSEEN  := $(addprefix metadata.language_info.,codemirror_mode file_extension mimetype nbconvert_exporter pygments_lexer version) \
           metadata.papermill metadata.widgets cell.metadata.papermill cell.metadata.execution cell.metadata.trusted

export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: reproduce test lint unit notebooks lab clean
.DEFAULT_GOAL := reproduce

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,quant]"
	touch $@

reproduce: .venv/installed
	$(BIN)/tasft reproduce --profile $(PROFILE) $(if $(NB),--notebooks $(NB)) $(if $(SEEDS),--seeds $(SEEDS)) $(ARGS)

test: lint unit notebooks

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

# A file's tests stay in one process and in order: fixtures are shared, and a notebook's cells follow each other.
unit: .venv/installed
	$(BIN)/pytest -n $(WORKERS) --dist loadfile $(ARGS)

# nbval cannot inject parameters, so papermill writes a parameterised copy first; its cells are then run and checked.
notebooks: .venv/installed
	$(BIN)/tasft reproduce --profile smoke --prepare-only $(if $(NB),--notebooks $(NB))
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --nbval-lax --nbval-cell-timeout 300 $(NAMES:%=runs/smoke/%.ipynb)

# What running a notebook writes into it, git does not see from here on: nbstripout takes it out on the way (.gitattributes).
lab: .venv/installed
	-git config filter.nbstripout.clean '"$(CURDIR)/$(BIN)/python" -m nbstripout --keep-id --extra-keys "$(UNSEEN)"'
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (ipykernel)"
	$(BIN)/jupyter lab --notebook-dir notebooks $(ARGS)

clean:
	rm -rf runs
