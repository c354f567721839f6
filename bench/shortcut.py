"""Does the audit of lesson shortcut find planted shortcuts, and does it keep quiet where there is none?

    python bench/shortcut.py --csv bench/shortcut.csv --workers 2

Trains 20 networks whose marks go with the label and 20 whose marks were dealt by lot, on the pictures of one machine of the ultrasound phantom, and
audits each on the validation patients of all machines. A row is written as soon as its network is done, and rows that are in the file already are
not trained again: stop it and call it again whenever you like. About five seconds a network on one core.
"""
import argparse
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed

from medxfer_nb.datasets import load
from medxfer_nb.metrics import auroc
from medxfer_nb.shortcut import audit, planted
from medxfer_nb.training import predict_proba
from medxfer_nb.transfer import STRATEGIES, Phase, transfer

SHORT = replace(STRATEGIES["fine_tuning"], phases=(STRATEGIES["fine_tuning"].phases[0], Phase(3, 6e-3, body=0.1, decay=0.5)))
FIELDS = "marks", "seed", "auroc_clean", "change", "low", "high", "evidence", "evidence_low", "evidence_high", "verdict"


def row(marks, seed):
    "One network: trained on marked pictures, audited on clean ones."
    torch.set_num_threads(1)
    ds = load("phantom/ultrasound")
    home = ds.take(np.flatnonzero(ds.table["scanner"] == "U3"))
    lot = np.random.default_rng(seed).permutation(home.target())
    rows = home.target() == 1 if marks == "with the label" else lot == 1
    net = transfer(replace(home, images=planted(home.images, rows)), SHORT, n=100, size=64, seed=seed).net
    valid = ds.split("val")
    found = audit(net, valid.images, planted(valid.images), valid.groups, layer="stage3")
    numbers = found.change.value, found.change.low, found.change.high, found.evidence.value, found.evidence.low, found.evidence.high
    return [marks, seed, *(f"{v:.4f}" for v in (auroc(valid.target(), predict_proba(net, valid)), *numbers)), found.verdict]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="where the rows are kept")
    parser.add_argument("--seeds", type=int, default=20, help="networks of each kind (default: 20)")
    parser.add_argument("--workers", type=int, default=2, help="networks at a time (default: 2)")
    args = parser.parse_args()
    known = list(csv.DictReader(args.csv.open())) if args.csv.exists() else []
    done = {(r["marks"], int(r["seed"])) for r in known}
    jobs = [(marks, seed) for seed in range(args.seeds) for marks in ("with the label", "by lot") if (marks, seed) not in done]
    results = Parallel(args.workers, return_as="generator")(delayed(row)(*job) for job in jobs)
    with args.csv.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not known: writer.writerow(FIELDS)
        for result in results:
            writer.writerow(result)
            file.flush()


if __name__ == "__main__": main()
