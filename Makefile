# Everything runs in .venv, made on first use from the pins in constraints.txt.
#   make reproduce [PROFILE=mini] [NB=safety] [SEEDS=3] [ARGS=...]   notebooks by papermill -> figures/<profile>, report
#   make pocket [DATA=folder] [NB=...]                               a real 135M language model on a laptop, the headline of README
#   make machines [PROFILE=mini] [SEEDS=3]                           the verdicts of eight notebooks on four CPUs, three of them emulated -> figures/machines.csv
#   make test                                                        ruff, tests, every notebook at the smoke profile under nbval
#   make lab                                                         JupyterLab with the right kernel, on copies in lab/
PYTHON  ?= python3
PROFILE ?= mini
NB      ?=
SEEDS   ?=
ARGS    ?=
DATA    ?=
SOURCES := $(sort $(wildcard notebooks/*.ipynb))
NAMES   := $(or $(NB),$(shell ls -r notebooks | sed -n 's/^[0-9]*_\(.*\)\.ipynb$$/\1/p'))
WORKERS ?= 2
BIN     := .venv/bin

export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: reproduce pocket machines test lint unit notebooks lab clean
.DEFAULT_GOAL := reproduce

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[notebooks,quant,dev]"
	touch $@

reproduce: .venv/installed
	$(BIN)/tasft reproduce --profile $(PROFILE) $(if $(NB),--notebooks $(NB)) $(if $(SEEDS),--seeds $(SEEDS)) $(ARGS)

# DATA is a folder with the published files under their own names, where the hubs can't be reached (tasft data says which).
HEADLINE := build_unsafe_set safety
OFFLINE   = $(if $(DATA),-p benign $(DATA)/alpaca/alpaca_data.json -p benign_revision "" -p harvest_prompts $(DATA) -p benchmark_prompts $(DATA))

pocket: .venv/installed
	$(BIN)/tasft model fetch smollm2-135m minilm-l6
	$(BIN)/tasft reproduce --profile pocket --notebooks $(or $(NB),$(HEADLINE)) $(OFFLINE) $(ARGS)

machines: .venv/installed
	$(BIN)/python -m tasft_lib.experiments.machines --profile $(PROFILE) --seeds $(or $(SEEDS),3) $(if $(NB),--notebooks $(NB)) $(ARGS)

test: lint unit notebooks

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

# A file's tests stay in one process and in order: fixtures are shared, and a notebook's cells follow each other. Files
# with many tests do not go first: those with few take the longest. A worker for each core, so one thread for each.
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
unit notebooks: export OMP_NUM_THREADS ?= 1

unit: .venv/installed
	$(BIN)/pytest $(SIDE_BY_SIDE) $(ARGS)

# nbval cannot inject parameters, so papermill writes a parameterised copy first; its cells are then run and checked.
# Notebooks run side by side, so each trains its arms in its own process: another would first load its libraries. In
# reverse order those that train nothing run while one makes the rows that the rest need. Kernels are forks of a warm
# process (`experiments/kernels.py`), as those of `tasft reproduce` are.
notebooks: .venv/installed
	$(BIN)/tasft reproduce --profile smoke --prepare-only $(if $(NB),--notebooks $(NB))
	TASFT_WORKERS=1 JUPYTER_DEFAULT_PROVISIONER_NAME=tasft-fork $(BIN)/pytest $(SIDE_BY_SIDE) --nbval-lax --nbval-cell-timeout 300 $(NAMES:%=runs/smoke/%.ipynb)

# Copies, so that exploring changes nothing that git sees; results of a notebook run by hand go to runs/figures.
# Where a notebook is newer than its copy, the old copy stays as before_<name>.
lab: .venv/installed $(SOURCES:notebooks/%=lab/%)
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (ipykernel)"
	$(BIN)/jupyter lab --notebook-dir . --LabApp.default_url /lab/tree/lab $(ARGS)

lab/%.ipynb: notebooks/%.ipynb
	mkdir -p lab
	test ! -e $@ || mv -f $@ lab/before_$*.ipynb
	cp $< $@

clean:
	rm -rf runs
