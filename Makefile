# make tour [DATA=name or folder]   from ImageNet to a medical target, with a report in reports/
# make lab                          JupyterLab on the tour
# make test                         every test, every notebook
# make notebooks [N="35_study tour"]  run these notebooks, or all, and store their outputs clean
# make bench                        against fastai, a plain torchvision loop and scikit-learn; writes bench/results.json
# make clean                        remove the installation and the reports; the cache stays
PYTHON ?= python3
DATA ?= phantom/ultrasound
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv-bench

.PHONY: tour lab test notebooks bench clean

tour: $(READY)
	$(BIN)/medxfer run nbs/tour.ipynb --data "$(DATA)" --out reports

lab: $(READY)
	$(BIN)/jupyter lab --ip=127.0.0.1 nbs/tour.ipynb

# the tour runs in tests/test_tour.py at a smaller size; two workers with one thread each: with more threads than cores, torch spends its time waiting
test: $(READY)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbmake --ignore nbs/tour.ipynb tests nbs

notebooks: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python nbs/execute.py $(N)
	$(BIN)/nbdev-clean

bench: $(READY) $(PEERS)/.ready
	$(BIN)/python bench/run.py

clean:
	rm -rf .venv $(PEERS) reports build *.egg-info

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --progress-bar on -c constraints.txt -e '.[dev]'
	touch $@

# the peers' environment sees the packages of .venv through main.pth, so that all train with the same torch
$(PEERS)/.ready: $(READY) constraints.txt bench/requirements.txt
	$(BIN)/python -m venv --clear $(PEERS)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > "$$($(PEERS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	$(PEERS)/bin/pip install --quiet --progress-bar on -c constraints.txt -r bench/requirements.txt
	touch $@
