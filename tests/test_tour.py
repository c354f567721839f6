"The tour, start to end, through the command line's own functions: smaller, but nothing in it is left out."
import re
from pathlib import Path

import numpy as np
import pytest
from papermill.parameterize import parameterize_notebook
from PIL import Image

from medxfer_nb import cli

TOUR = Path(__file__).parents[1] / "nbs" / "tour.ipynb"


def walk(data, **small):
    "The text outputs and the report of a tour."
    nb = parameterize_notebook(cli.open_notebook(TOUR), dict(data=data, **small), kernel_name="python3", language="python")
    cli.execute(nb, TOUR.parent)
    texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    return "\n".join("".join(t) for t in texts), cli.report(nb)


@pytest.mark.slow
def test_tour_on_the_phantom():
    text, page = walk("phantom/ultrasound", n=40, seeds=2, size=64)
    verdicts = re.findall(r"^(?:helped|no evidence|hurt): \w+ minus scratch, AUROC: [+-]0\.\d+ \[", text, re.M)
    assert len(verdicts) == 4 and verdicts[-1].startswith("no evidence")  # the last one: shuffled labels
    assert "semi-synthetic" in text and "test opened 0 times" in text and "42 test patients" in text
    pictures = re.findall(r"<img\b[^>]*>", page)
    assert len(pictures) >= 4 and all(re.search(r'alt="[^"]', p) and 'src="data:' in p for p in pictures)
    assert not re.findall(r'(?:src|<link[^>]*href)="http[^"]*"', page)  # nothing is loaded from elsewhere


@pytest.mark.slow
def test_tour_on_a_folder_of_classes(tmp_path):
    rng = np.random.default_rng(0)
    for name, mean in (("dark", 90), ("light", 130)):
        (tmp_path / name).mkdir()
        for i in range(60):
            picture = rng.normal(mean, 40, (40, 50)).clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / name / f"{i}.png")
    text, page = walk(str(tmp_path), n=20, seeds=2, size=64)
    assert "patients unknown" in text and "minus scratch" in text and "dark" in page


@pytest.mark.real_data
@pytest.mark.slow
def test_tour_on_real_ultrasound():
    text, _ = walk("breastmnist", n=40, seeds=2, size=64)
    assert "malignant" in text and "156 test patients" in text
