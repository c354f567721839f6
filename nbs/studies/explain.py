"""Which map of the default network points at the lesion? Trains the networks that explain.ipynb reads; minutes a seed. Stop it and call it again.

    python nbs/studies/explain.py --seeds 3

For each seed: the default transfer (fine-tuning, 100 pictures, 128 px, the ultrasound phantom); every map is scored on the validation patients, the
best by the precision of pixels meets the test patients, beside Grad-CAM at its default layer and the chosen map of a network with random weights."""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from medxfer_nb.backbones import create_model
from medxfer_nb.datasets import load
from medxfer_nb.explain import METHODS, explain
from medxfer_nb.faithful import controls, score_maps
from medxfer_nb.metrics import auroc, score
from medxfer_nb.training import predict_proba
from medxfer_nb.transfer import transfer

FILE = Path(__file__).with_suffix("") / "pointing.csv"
CAMS, PIXELS = ("grad_cam", "grad_cam++", "xgrad_cam", "hires_cam", "layer_cam"), ("guided_backprop",)
LAYERS, PLAIN = ("stage1", "stage2", "stage3", "stage4"), ("grad_cam", "stage4")


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


def one(ds, seed):
    "All rows of a seed."
    net, train, valid = transfer(ds, n=100, seed=seed).net.eval(), lesions(ds, "train"), ds.split("val")
    quality = score(auroc, valid.target(), predict_proba(net, valid), valid.groups)
    facts = dict(seed=seed, auroc=quality.value, auroc_low=quality.low, auroc_high=quality.high)
    part = lesions(ds, "val")
    ways = {f"{m}, {layer}": (m, layer) for m in CAMS for layer in LAYERS} | {m: (m, None) for m in PIXELS}
    table = score_maps({k: evidence(net, part, *w) for k, w in ways.items()}, part.masks, controls(part.images, train.masks), part.groups)
    best = max(table.index, key=lambda k: table.loc[k, "precision"].value)
    yield from rows(table, **facts, split="validation")
    untrained, part = create_model(pretrained=False, num_classes=2, size=net.spec.size, seed=seed), lesions(ds, "test")
    final = {best: evidence(net, part, *ways[best]), ", ".join(PLAIN): evidence(net, part, *PLAIN)}
    final[f"random weights: {best}"] = evidence(untrained, part, *ways[best])
    yield from rows(score_maps(final, part.masks, controls(part.images, train.masks), part.groups), **facts, split="test")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="networks (default: 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    FILE.parent.mkdir(exist_ok=True)
    found = [pd.read_csv(FILE)] if FILE.exists() else []
    done = {int(seed) for table in found for seed in table["seed"]}
    for seed in sorted(set(range(args.seeds)) - done):
        found.append(pd.DataFrame(one(load("phantom/ultrasound"), seed)))
        pd.concat(found).round(4).to_csv(FILE, index=False)


if __name__ == "__main__": main()
