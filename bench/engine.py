"""The probes of a whole study, after the features are there: budgets x seeds draws, the penalty of each by cross-validation over patients.

    python bench/engine.py

prints the seconds of the features and of the probes, and how far the answers are from scikit-learn's when that has run in `bench/run.py`.
"""
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from common import PENALTIES
from ours import data, network

from medxfer_nb.backbones import extract
from medxfer_nb.probes import probe


def draws(train, budgets, seeds):
    "The rows of each draw, as `transfer` draws them, in ascending order."
    return [np.arange(len(train)) if n == "all" else np.sort(train.draw(n, seed)) for n in budgets for seed in range(seeds)]


def engine(ds, folder, size=96, budgets=(10, 20, 50, 100, "all"), seeds=10):
    "Seconds for the features and for all probes; the features stay in `folder` for scikit-learn."
    train, net, start = ds.split("train"), network("tf_efficientnet_lite0", size), time.perf_counter()
    x, test = (extract(net, part.images).double().numpy() for part in (train, ds.split("val")))
    features, rows = time.perf_counter() - start, draws(train, budgets, seeds)
    np.savez(folder / "features.npz", x=x, y=train.target(), groups=np.unique(train.groups, return_inverse=True)[1], test=test,
             rows=np.concatenate(rows), cuts=np.cumsum([len(r) for r in rows])[:-1])
    start = time.perf_counter()
    fitted = probe(x, train.target(), train.groups, rows, PENALTIES)
    seconds = time.perf_counter() - start
    np.save(folder / "ours.npy", [model.predict_proba(test) for model in fitted])
    return dict(draws=len(rows), penalties=len(PENALTIES), features=features, seconds=seconds, C=[float(model.C) for model in fitted])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder: print(json.dumps(engine(data(), Path(folder)), indent=1))
