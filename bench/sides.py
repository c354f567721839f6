"""Which side should the pictures of the label study have? The probe's AUROC on training pictures that it has not seen, side by side.

    MEDXFER_DATA=folder/of/breastmnist.npz python bench/sides.py      # four minutes

No validation and no test picture takes part: folds of patients, ten at a time, shuffled three times; in each the penalty is chosen within the rest.
"""
import argparse

import numpy as np
from ours import data, network
from sklearn.model_selection import StratifiedGroupKFold

from medxfer_nb.backbones import extract
from medxfer_nb.metrics import auroc, score
from medxfer_nb.probes import probe

SIDES = (28, 32, 40, 48, 56, 64, 80, 96, 128)


def unseen(x, y, groups, seed):
    "Probabilities for each picture from a probe that has not seen its patient."
    folds, p = [*StratifiedGroupKFold(10, shuffle=True, random_state=seed).split(x, y, groups)], np.zeros((len(y), y.max() + 1))
    for solved, (_, rows) in zip(probe(x, y, groups, [rest for rest, _ in folds]), folds): p[rows] = solved.predict_proba(x[rows])
    return p


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES, help="in pixels")
    train = data().split("train")
    for side in parser.parse_args().sides:
        x = extract(network("tf_efficientnet_lite0", side), train.images).numpy()
        p = np.mean([unseen(x, train.target(), train.groups, seed) for seed in range(3)], axis=0)
        print(f"{side} px: {score(auroc, train.target(), p, train.groups)}", flush=True)


if __name__ == "__main__": main()
