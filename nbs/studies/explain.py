"""Which map of the default network points at the lesion? Trains the networks that explain.ipynb reads, ten minutes or so a seed.

    python nbs/studies/explain.py --seeds 3 --workers 2

For each seed: the default transfer (fine-tuning, 100 pictures, 128 px, the ultrasound phantom); every map is scored on the validation patients, the
best by the precision of pixels meets the test patients, beside an earlier choice, Grad-CAM at its default layer, and networks with random weights."""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed

from medxfer_nb.backbones import create_model
from medxfer_nb.datasets import load
from medxfer_nb.explain import METHODS, explain
from medxfer_nb.faithful import controls, score_maps
from medxfer_nb.metrics import auroc, score
from medxfer_nb.training import predict_proba
from medxfer_nb.transfer import transfer

FILE = Path(__file__).with_suffix("") / "pointing.csv"
LAYERS, PLAIN = ("stage1", "stage2", "stage3", "stage4"), ("grad_cam", "stage4")
FIRST = "layer_cam", "stage2"  # what validation had chosen when six of the methods were asked
SLOW = "score_cam", "stage4"  # 1280 channels, and a pass through the whole network for each of them and each picture


def evidence(net, part, method, layer):
    "The map of each picture, at the side of its mask."
    return explain(net, net.batch(part.images), 1, method, None if METHODS[method].pixels else layer).evidence(part.masks.shape[1:])


def lesions(ds, split):
    "The pictures of a split that show a lesion."
    part = ds.split(split)
    return part.take(np.flatnonzero(part.target() == 1))


def rows(table, **facts):
    "A row for each map and measure of `score_maps`."
    for measure, against in zip(table.columns[::2], table.columns[1::2]):
        for name, (own, more) in zip(table.index, table[[measure, against]].to_numpy()):
            numbers = dict(value=own.value, low=own.low, high=own.high, more=more.value, more_low=more.low, more_high=more.high)
            yield facts | dict(map=name, measure=measure, control=against.split(" - ")[1]) | numbers


def one(seed):
    "All rows of a seed."
    torch.set_num_threads(1)
    ds = load("phantom/ultrasound")
    net, train, valid = transfer(ds, n=100, seed=seed).net.eval(), lesions(ds, "train"), ds.split("val")
    quality = score(auroc, valid.target(), predict_proba(net, valid), valid.groups)
    facts = dict(seed=seed, auroc=quality.value, auroc_low=quality.low, auroc_high=quality.high)
    part = lesions(ds, "val")
    ways = {f"{m}, {layer}": (m, layer) for m, way in METHODS.items() if not way.pixels for layer in LAYERS if (m, layer) != SLOW}
    ways |= {m: (m, None) for m, way in METHODS.items() if way.pixels}
    table = score_maps({k: evidence(net, part, *w) for k, w in ways.items()}, part.masks, controls(part.images, train.masks), part.groups)
    best = max(table.index, key=lambda k: table.loc[k, "precision"].value)
    untrained, part = create_model(pretrained=False, num_classes=2, size=net.spec.size, seed=seed), lesions(ds, "test")
    judged = {best: ways[best], ", ".join(FIRST): FIRST}
    final = {name: evidence(net, part, *way) for name, way in (judged | {", ".join(PLAIN): PLAIN}).items()}
    final |= {f"random weights: {name}": evidence(untrained, part, *way) for name, way in judged.items()}
    tested = score_maps(final, part.masks, controls(part.images, train.masks), part.groups)
    return [*rows(table, **facts, split="validation"), *rows(tested, **facts, split="test")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="networks (default: 3)")
    parser.add_argument("--workers", type=int, default=2, help="networks at a time (default: 2)")
    args = parser.parse_args()
    FILE.parent.mkdir(exist_ok=True)
    found = [pd.read_csv(FILE)] if FILE.exists() else []
    missing = sorted(set(range(args.seeds)) - {int(seed) for table in found for seed in table["seed"]})
    for rows_of_seed in Parallel(args.workers, return_as="generator_unordered")(delayed(one)(seed) for seed in missing):
        found.append(pd.DataFrame(rows_of_seed))
        pd.concat(found).sort_values("seed", kind="stable").round(4).to_csv(FILE, index=False)


if __name__ == "__main__": main()
