"Real JupyterLab in real Chromium: the widgets answer the keyboard, and no request leaves the machine."
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from medxfer_nb.cli import report

pytestmark = pytest.mark.browser

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]
NO_NEWS = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
RUN_ALL = """async () => {
    const app = window.jupyterapp;
    await app.restored;
    const panel = app.shell.currentWidget;
    await panel.context.ready;
    await panel.sessionContext.ready;
    await panel.sessionContext.session.kernel.info;
    await app.commands.execute('notebook:run-all-cells');
}"""


def wait_for(condition, seconds=60):
    "The first true value of `condition()`."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition(): return value
        time.sleep(0.1)
    raise TimeoutError(f"waited {seconds} s")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab server with settings of its own: the address to open, and the folder it serves."
    home = tmp_path_factory.mktemp("lab")
    for name in ("config", "data", "runtime", "ipython", "settings", "work"): (home / name).mkdir()
    (home / "settings/overrides.json").write_text(json.dumps(NO_NEWS))
    dirs = {f"JUPYTER_{n.upper()}_DIR": str(home / n) for n in ("config", "data", "runtime")} | {"IPYTHONDIR": str(home / "ipython")}
    command = [Path(sys.executable).with_name("jupyter-lab"), "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
               f"--ServerApp.root_dir={home / 'work'}", f"--IdentityProvider.token={secrets.token_hex()}", "--LabApp.expose_app_in_browser=True",
               f"--LabApp.app_settings_dir={home / 'settings'}", f"--LabServerApp.app_settings_dir={home / 'settings'}"]
    with open(home / "log", "wb") as log:
        server = subprocess.Popen(command, env=os.environ | dirs, stdout=log, stderr=log, start_new_session=True)
    try:
        facts = json.loads(wait_for(lambda: next((home / "runtime").glob("jpserver-*.json"), None)).read_text())
        yield f"{facts['url']}lab/workspaces/{{0}}/tree/{{0}}.ipynb?token={facts['token']}", home / "work"
    finally:
        server.terminate()
        try: server.wait(10)
        except subprocess.TimeoutExpired: pass
        try: os.killpg(server.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        server.wait()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    "A page that counts the requests which leave this machine, and fails when there is one."
    page = chromium.new_page(viewport={"width": 1200, "height": 1000})
    away = []
    page.on("request", lambda r: away.append(r.url) if urlsplit(r.url).hostname not in (None, "127.0.0.1") else None)
    yield page
    page.close()
    assert away == []


@pytest.fixture
def run(lab, page):
    "Write a notebook of these cells, open it in the lab, run it all, and return the page."
    def run(*cells):
        address, folder = lab
        name = secrets.token_hex(4)  # also of the lab's workspace, which must not bring back an older notebook
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(new_notebook(cells=[new_code_cell(c) for c in cells], metadata=kernel), folder / f"{name}.ipynb")
        page.goto(address.format(name))
        page.wait_for_function("name => window.jupyterapp?.shell?.currentWidget?.context?.path === name", arg=f"{name}.ipynb")
        page.evaluate(RUN_ALL)
        return page
    return run


def press(slider, key, times):
    slider.focus()
    for _ in range(times): slider.press(key)


SQUARES = """
import io
import ipywidgets as W
from PIL import Image

slider, label, picture = W.IntSlider(0, 0, 10, description="side"), W.Label(), W.Image(format="png")

def draw(change):
    with io.BytesIO() as f:
        Image.new("L", (20 + 5 * slider.value, 20)).save(f, "png")
        picture.value = f.getvalue()
    label.value = f"side is {slider.value}"

slider.observe(draw, "value")
draw(None)
W.VBox([slider, label, picture])
"""


def test_slider_moves_label_and_picture(run):
    page = run(SQUARES)
    image = page.locator("img.jupyter-widgets")
    before = image.get_attribute("src")
    press(page.locator(".noUi-handle"), "ArrowRight", 3)
    page.locator(".widget-label >> text=side is 3").wait_for()
    wait_for(lambda: image.get_attribute("src") != before)


FREEZE = """
import numpy as np, pandas as pd
from medxfer_nb.metrics import auroc, score
from medxfer_nb.widgets import FreezeExplorer

y = np.arange(60) % 2
chance = np.random.default_rng(0).uniform(0, 0.5, (4, 60))
FreezeExplorer(pd.DataFrame([
    dict(stage=s, budget=n, score=score(auroc, y, chance[i + 2 * j] + 0.2 * y), frozen=1000 * (i + 1), trained=9)
    for i, s in enumerate(["stem", "stage1"]) for j, n in enumerate([10, 100])]))
"""


def test_freeze_explorer_answers_the_keyboard(run):
    page = run(FREEZE)
    label, image = page.locator(".widget-html-content"), page.locator("img.jupyter-widgets")
    page.get_by_text("stem to stage1, 2,000 parameters").wait_for()
    before = image.get_attribute("src")
    stage, budget = page.locator(".noUi-handle").all()
    press(stage, "ArrowLeft", 1)
    page.get_by_text("Frozen: stem, 1,000 parameters").wait_for()
    press(budget, "ArrowLeft", 1)
    page.get_by_text("on 10 labels").wait_for()
    wait_for(lambda: image.get_attribute("src") != before)
    assert "Validation AUROC 0." in label.inner_text()


CAMS = """
import numpy as np
from medxfer_nb.widgets import CamExplorer

rng = np.random.default_rng(0)
maps = {"stage1": rng.random((3, 2, 8, 8)), "stage2": rng.random((3, 2, 4, 4))}
CamExplorer(rng.integers(0, 255, (3, 32, 32), np.uint8), maps, np.full((3, 2), 0.5), ("healthy", "sick"))
"""


def test_cam_explorer_answers_the_keyboard(run):
    page = run(CAMS)
    image = page.locator("img.jupyter-widgets")
    page.get_by_text("Picture 0. Predicted: healthy 0.50, sick 0.50. Evidence for healthy after stage2").wait_for()
    before = image.get_attribute("src")
    index, kind, layer = page.locator(".noUi-handle").all()
    press(index, "ArrowRight", 2)
    press(kind, "ArrowRight", 1)
    press(layer, "ArrowLeft", 1)
    page.get_by_text("Picture 2. Predicted: healthy 0.50, sick 0.50. Evidence for sick after stage1").wait_for()
    wait_for(lambda: image.get_attribute("src") != before)


def test_report_opens_without_network(page, tmp_path):
    with io.BytesIO() as f:
        Image.new("L", (40, 20)).save(f, "png")
        picture = new_output("display_data", {"image/png": b64encode(f.getvalue()).decode()}, metadata={"image/png": {"alt": "a black box"}})
    (tmp_path / "report.html").write_text(report(new_notebook(cells=[new_markdown_cell("# A title"), new_code_cell("secret", outputs=[picture])])))
    page.goto(f"file://{tmp_path / 'report.html'}")
    assert page.get_by_role("img", name="a black box").bounding_box()["width"] == 40
    assert page.get_by_role("heading", name="A title").is_visible() and page.get_by_text("secret").count() == 0
