# make tour [DATA=name or folder]   from ImageNet to a medical target, with a report in reports/
# make lab                          JupyterLab on the tour
# make test                         every test, every notebook
# make clean                        remove the installation and the reports; the cache stays
PYTHON ?= python3
DATA ?= phantom/ultrasound
BIN := .venv/bin
READY := .venv/.ready

.PHONY: tour lab test clean

tour: $(READY)
	$(BIN)/medxfer run nbs/tour.ipynb --data "$(DATA)" --out reports

lab: $(READY)
	$(BIN)/jupyter lab --ip=127.0.0.1 nbs/tour.ipynb

# the tour runs in tests/test_tour.py at a smaller size; two workers with one thread each: with more threads than cores, torch spends its time waiting
test: $(READY)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbmake --ignore nbs/tour.ipynb tests nbs

clean:
	rm -rf .venv reports build *.egg-info

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --progress-bar on -c constraints.txt -e '.[dev]'
	touch $@
