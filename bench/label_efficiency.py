"""How much do labels buy? Four strategies, five budgets, ten seeds, in one call of `compare`.

    python bench/label_efficiency.py --size 48 --workers 2 --save nbs/studies/medmnist/breast.npz

prints the scores with intervals and the seconds, in all and for each strategy, as JSON, and keeps the study where --save says.
"""
import argparse
import json
import time
from dataclasses import replace

import pandas as pd
from ours import data

from medxfer_nb import compare
from medxfer_nb.strategies import HEAD, KNOWN
from medxfer_nb.transfer import Strategy, large_batches


def grown(s): return replace(s, phases=tuple(replace(phase, batch_size=large_batches) for phase in s.phases))


_, LAST = KNOWN["last_two"].phases
PARTIAL = Strategy("partial", "the last two stages, four kept views", (HEAD, replace(LAST, views=4)))
SCRATCH = replace(KNOWN["scratch"], size=32)  # BreastMNIST's pictures have 28 pixels
STRATEGIES = [grown(s) for s in (SCRATCH, KNOWN["feature_extraction"], PARTIAL, KNOWN["fine_tuning"])]  # small network, probe, partial, full


def label_efficiency(ds, size, budgets=(10, 20, 50, 100, "all"), seeds=10, workers=2, save=None):
    "Wall seconds of the call with its intervals; for each strategy the seconds of its runs over the number of workers; and the scores."
    start = time.perf_counter()
    study = compare(ds, STRATEGIES, budgets, seeds, size=size, workers=workers, precision="auto")
    found = study.summary()[study.metric.name]
    wall = time.perf_counter() - start
    if save: study.save(save)
    seconds = pd.Series({(study.arms[arm].strategy, arm, seed): s for (arm, seed), s in study.seconds.items()}).groupby(level=0).sum() / workers
    scores = [dict(labels=arm.n, strategy=arm.strategy, score=str(found[name])) for name, arm in study.arms.items()]
    facts = dict(data=ds.info.name, size=size, seeds=seeds, workers=workers, wall=wall, seconds=seconds.to_dict())
    return facts | dict(metric=study.metric.name, scores=scores, failed={f"{arm}, seed {seed}": str(e) for (arm, seed), e in study.failed.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budgets", nargs="+", type=lambda n: n if n == "all" else int(n), default=[10, 20, 50, 100, "all"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", help="a file for the study, *.npz")
    asked = parser.parse_args()
    print(json.dumps(label_efficiency(data(), **vars(asked)), indent=1))


if __name__ == "__main__": main()
