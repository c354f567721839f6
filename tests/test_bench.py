"bench: results that are committed say when and where they were measured, and keep what was asked for."
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
CAM = json.loads((BENCH / "cam.json").read_text())


def test_results_say_when_and_on_what():
    assert CAM["date"] and CAM["machine"]["cpu"] and CAM["machine"]["cores"] and (CAM["batch"], CAM["size"], CAM["threads"]) == (16, 224, 2)


@pytest.mark.parametrize("row", CAM["rows"], ids=lambda row: row["network"])
def test_class_maps_without_a_backward_pass_are_as_fast_as_promised(row):
    s = row["seconds"]
    ratios = [s["grad-cam"] / s[f"ours, {start}"] for start in ("raw", "cached")]
    assert [row["raw_faster"], row["cached_faster"]] == pytest.approx(ratios)
    assert row["raw_faster"] >= 2.5 and row["cached_faster"] >= 50 and row["largest_difference_of_the_stretched_maps"] < 1e-5


def test_the_readme_names_every_program():
    readme = (BENCH / "README.md").read_text()
    helpers = {"common", "ours", "peers", "ceiling"}  # called by run.py
    assert [p.name for p in BENCH.glob("*.py") if p.stem not in helpers and f"bench/{p.name}" not in readme] == []
