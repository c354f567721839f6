"The command line: reports, exit codes, and what is kept when something goes wrong."
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from medxfer_nb.cli import main, report
from medxfer_nb.datasets import list_datasets

MEDXFER = Path(sys.executable).with_name("medxfer")
PARAMETERS = new_code_cell("data = 'phantom/ultrasound'", metadata={"tags": ["parameters"]})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    "Every test works in an empty folder."
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*sources, name="small.ipynb", first=PARAMETERS):
    "A notebook with a title, a parameter and these code cells."
    cells = [new_markdown_cell("# A title"), *([first] if first else []), *(new_code_cell(s) for s in sources)]
    nbformat.write(new_notebook(cells=cells), name)
    return name


def start(*words): return subprocess.Popen([MEDXFER, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def error_line(capsys):
    err = capsys.readouterr().err
    assert err.startswith("medxfer: ") and "Traceback" not in err
    return err


def test_version_answers_without_torch():
    code = "import sys; from medxfer_nb.cli import main; main(['version']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.startswith("medxfer_nb ")


@pytest.mark.parametrize("words", [[], ["walk"], ["run"], ["run", "a.ipynb", "--dat"]])
def test_usage_error_exits_2(words, capsys):
    with pytest.raises(SystemExit) as stop: main(words)
    assert stop.value.code == 2 and "usage: medxfer" in capsys.readouterr().err


def test_run_writes_notebook_and_report(capsys):
    assert main(["run", write("print('data', data)"), "--data", "digits"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "report: reports/small.html"
    outputs = [c.outputs for c in nbformat.read("reports/small.ipynb", 4).cells if c.cell_type == "code"]
    assert outputs[-1][0].text == "data digits\n"
    assert "data digits" in Path("reports/small.html").read_text() and "print(" not in Path("reports/small.html").read_text()


def test_run_does_not_touch_the_source():
    before = Path(write("1 + 1")).read_bytes()
    main(["run", "small.ipynb", "--data", "digits", "--out", "elsewhere"])
    assert Path("small.ipynb").read_bytes() == before and Path("elsewhere/small.html").exists()


def test_folder_is_found_from_the_notebooks_own_place(folder):
    (folder / "nbs").mkdir()
    (folder / "my pictures").mkdir()
    write("from pathlib import Path", "assert Path(data).is_dir()", name="nbs/small.ipynb")
    assert main(["run", "nbs/small.ipynb", "--data", "my pictures"]) == 0


def test_text_appears_while_the_cell_still_runs(folder):
    wait = "import time, pathlib; print('waiting', flush=True)\nwhile not pathlib.Path('go').exists(): time.sleep(.05)"
    with start("run", write(wait)) as process:
        lines = iter(process.stdout.readline, "")
        assert any(line == "waiting\n" for line in lines) and process.poll() is None
        (folder / "go").touch()
        assert list(lines)[-1] == "report: reports/small.html\n"
    assert process.returncode == 0


def test_widgets_are_told_of_and_not_spelled_out(capsys):
    assert main(["run", write("import ipywidgets as w", "w.HBox([w.IntSlider()])", "1 + 1")]) == 0
    out = capsys.readouterr().out
    assert "[widgets] open the notebook to move them\n2\n" in out and "HBox" not in out


def test_failing_cell_keeps_the_notebook(capsys):
    assert main(["run", write("print('before')", "1 / 0", "print('after')")]) == 1
    assert "cell 4 of small.ipynb failed: ZeroDivisionError: division by zero" in error_line(capsys)
    cells = nbformat.read("reports/small.ipynb", 4).cells
    assert [bool(c.get("outputs")) for c in cells] == [False, False, True, True, False]
    assert not Path("reports/small.html").exists()


def test_error_that_the_user_can_mend_is_one_line(capsys):
    assert main(["run", write("from medxfer_nb.core import MedxferError", "raise MedxferError('no such set')")]) == 2
    assert error_line(capsys) == "medxfer: no such set\n" and Path("reports/small.ipynb").exists()


def test_kernel_that_dies_is_reported(capsys):
    assert main(["run", write("import os; os._exit(1)")]) == 1
    assert "its process ended" in error_line(capsys) and Path("reports/small.ipynb").exists()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_stop_keeps_the_notebook_and_ends_the_kernel(sign, folder):
    source = "import os, time; print('kernel', os.getpid(), flush=True); time.sleep(600)"
    with start("run", write("print('done')", source)) as process:
        kernel = next(line for line in iter(process.stdout.readline, "") if line.startswith("kernel"))
        process.send_signal(sign)
        assert process.wait(30) == 1 and "its process ended" in process.stderr.read()
    assert not Path("/proc", kernel.split()[1]).exists()
    assert nbformat.read("reports/small.ipynb", 4).cells[2].outputs[0].text == "done\n"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'])
def test_file_that_is_no_notebook(text, capsys):
    Path("small.ipynb").write_text(text)
    assert main(["run", "small.ipynb"]) == 2
    assert "small.ipynb" in error_line(capsys)


def test_data_needs_a_parameters_cell(capsys):
    assert main(["run", write("1", first=None), "--data", "digits"]) == 2
    assert "tagged 'parameters'" in error_line(capsys)


def test_report_must_not_overwrite_the_notebook(capsys):
    assert main(["run", write("1"), "--out", "."]) == 2
    assert "overwrite" in error_line(capsys)


def test_out_that_is_a_file(capsys):
    Path("reports").touch()
    assert main(["run", write("1")]) == 2
    assert "--out" in error_line(capsys)


def test_missing_notebook(capsys):
    assert main(["run", "tuor.ipynb"]) == 2
    assert "tuor.ipynb" in error_line(capsys)


def test_report_keeps_alt_text_and_loads_nothing():
    picture = nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="}, metadata={"image/png": {"alt": 'a "box" & more'}})
    bar = nbformat.v4.new_output("stream", name="stderr", text="50%|###")
    html = report(new_notebook(cells=[new_code_cell("secret = 1", outputs=[picture, bar])]))
    assert BeautifulSoup(html, "html.parser").img["alt"] == 'a "box" & more'
    assert "50%|" not in html and "secret" not in html and "<script" not in html and "<link" not in html


def test_models_finds_by_pattern(capsys):
    assert main(["models", "*efficientnet_lite0"]) == 0
    assert "tf_efficientnet_lite0  (weights installed, Apache-2.0)" in capsys.readouterr().out.splitlines()


def test_models_without_a_match(capsys):
    assert main(["models", "resnet81"]) == 2
    assert "resnet81" in error_line(capsys)


def test_data_lists_every_set(capsys):
    assert main(["data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == "breastmnist 780 pictures, CC BY 4.0".split() for line in lines)
    assert [line.split()[0] for line in lines] == list_datasets()


def test_data_shows_counts_and_licence(capsys):
    assert main(["data", "digits"]) == 0
    out = capsys.readouterr().out
    assert "5000 pictures (28, 28)" in out and "licence: BSD-3" in out


def test_data_suggests_the_nearest_name(capsys):
    assert main(["data", "brestmnist"]) == 2
    assert "breastmnist" in error_line(capsys)


def page(text): return BeautifulSoup(report(new_notebook(cells=[new_markdown_cell(text)])), "html.parser").body


def test_formulas_in_the_report_are_mathml():
    body = page(r"Loss $L = -\frac1n\sum_i \log p_i$ and" "\n\n" r"$$a < \max(z, 0)$$" "\n\n" r"\begin{align} a &= b \\ c &= d \end{align}")
    inline, block, table = body.find_all("math")
    assert "$" not in body.text and "\\" not in body.text
    assert inline.mfrac.text == "1n" and inline["display"] == "inline" and block["display"] == "block" and "<max(z,0)" in block.text and table.mtable


def test_formula_that_cannot_be_translated_and_dollars_in_code():
    body = page(r"Open $\frac{$ & <b>, costs `$5 and $6`.")
    assert [c.text for c in body.find_all("code")] == [r"\frac{", "$5 and $6"] and not body.find("math")


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("nbs/**/*.ipynb")), ids=lambda p: p.stem)
def test_no_lesson_leaves_latex_in_its_report(path):
    nb = nbformat.read(path, 4)
    nb.cells = [c for c in nb.cells if c.cell_type == "markdown"]
    body = BeautifulSoup(report(nb), "html.parser").body
    for code in body.find_all("code"): code.extract()
    assert "$" not in body.text and "\\" not in body.text


LOOP = """
import os, time
from medxfer_nb import core
core._EVERY = 0.2
for _ in core.progress(range(3), 'outer'):
    for _ in core.progress(range(9), 'inner'): time.sleep(.01)
    time.sleep(.25)
"""


def test_log_of_a_run_gets_lines_and_no_bars():
    done = subprocess.run([MEDXFER, "run", write(LOOP)], capture_output=True, text=True, check=True)
    assert "\r" not in done.stderr and [line.split(":")[0] for line in done.stderr.splitlines()] == ["outer"] * 3
