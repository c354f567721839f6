"What several test files share: the tests that need something of the machine say so when it is missing."
import os
import shutil

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("MEDXFER_DEVICE", "cpu")  # for exact oracles; test_gpu.py looks at the graphics card

NEEDS = {
    "real_data": (os.environ.get("MEDXFER_DATA"), "MEDXFER_DATA does not name the folder of the MedMNIST files"),
    "browser": (shutil.which("chromium"), "Chromium is not installed"),
}


def pytest_collection_modifyitems(items):
    for item in items:
        for marker, (there, reason) in NEEDS.items():
            if not there and item.get_closest_marker(marker): item.add_marker(pytest.mark.skip(reason=reason))
