"curves: lines, costs and the page, from simulated studies. The lookup of labels is tested where studies are made, in test_compare."
import re

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from scipy.stats import norm

from medxfer_nb.core import MedxferError
from medxfer_nb.curves import _curves, _lines
from medxfer_nb.study import Arm, Study


def simulated(title="a simulation", budgets=(10, 40), seeds=3, missing=()):
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(30), 2)
    y = rng.integers(0, 2, 30)[groups]
    arms = {f"{s}, n={n}": Arm(s, "net", n) for s in ("scratch", "transfer") for n in budgets}
    predictions = {(a, s): norm.cdf((1 + (arm.strategy == "transfer")) * y + rng.normal(size=60)) for a, arm in arms.items() for s in range(seeds)}
    for key in missing: del predictions[key]
    study = Study(title, y, groups, arms, seeds, predictions=predictions, n_boot=200)
    study.seconds.update({k: 2.0 for k in predictions}); study.flops.update({k: 3e9 for k in predictions})
    return study


def test_lines_have_every_budget_in_order_and_say_what_they_show():
    study = simulated(budgets=(40, 10))
    lines, (fig, alt) = _lines(study), _curves(study)
    assert {label: [n for n, _ in points] for label, points in lines.items()} == {("scratch", "net"): [10, 40], ("transfer", "net"): [10, 40]}
    assert all(f"{s} with {n} labels" in alt for points in lines.values() for n, s in points)
    drawn = {line.get_label(): line.get_ydata() for line in fig.axes[0].lines}
    np.testing.assert_allclose(drawn["transfer, net"], [s.value for _, s in lines["transfer", "net"]])


def test_an_arm_without_runs_has_no_point():
    study = simulated(missing=[("scratch, n=40", s) for s in range(3)])
    assert [n for n, _ in _lines(study)["scratch", "net"]] == [10] and _curves(study)


def test_costs_are_means_over_finished_runs():
    study = simulated(missing=[("scratch, n=10", 0)])
    study.seconds["scratch, n=10", 1] = 4.0
    table = study.costs()
    assert table.loc["scratch, n=10", "seconds"] == 3 and (table["GFLOP"] == 3).all() and list(table.index) == list(study.arms)


def test_costs_without_counted_operations_are_nan():
    study = simulated()
    study.flops.clear()
    assert study.costs()["GFLOP"].isna().all() and study.costs()["seconds"].notna().all()


# --- the page ---


def test_page_holds_tables_figures_verdicts_and_what_is_missing(tmp_path):
    study = simulated(missing=[("transfer, n=10", 2)])
    study.failed["transfer, n=10", 2] = RuntimeError("out of memory")
    study.to_html(tmp_path / "deep" / "page.html", against="scratch")
    page = BeautifulSoup((tmp_path / "deep" / "page.html").read_text(encoding="utf-8"), "html.parser")
    assert page.h1.text == study.title and "60 test images of 30 patients, 3 seeds" in page.p.text
    rows = ([[c.text for c in row.find_all(["td", "th"])] for row in table.find_all("tr")] for table in page.find_all("table"))
    costs, verdicts = map(pd.DataFrame, rows)
    assert str(study.costs().iloc[0, 0]) in costs.values and set(verdicts.iloc[1:, -1]) <= {"helped", "no evidence", "hurt"}
    images = page.find_all("img")
    assert len(images) == 2 and all(i["alt"].startswith(study.title) and i["src"].startswith("data:image/png") for i in images)
    assert page.li.text == "transfer, n=10, seed 2: RuntimeError: out of memory"


def test_names_cannot_smuggle_in_code(tmp_path):
    study = simulated(title="<script>alert(1)</script>")
    study.arms["<img src=x onerror=alert(1)>"] = Arm("scratch", "net", 10)
    study.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<img src=x" not in text and not re.search(r"(src|href)=.https?:", text)


def test_one_budget_has_one_figure_and_no_strategy_no_verdict(tmp_path):
    simulated(budgets=(10,)).to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<img") == 1 and "Verdicts" not in text


def test_a_page_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(MedxferError, match="did you mean"): simulated().to_html(tmp_path / "page.html", against="scrach")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(MedxferError, match="file"): simulated().to_html(tmp_path / "file" / "page.html")
