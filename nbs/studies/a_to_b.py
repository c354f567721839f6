"""From A to B on real data: trains every run of the study that a_to_b.ipynb reads. Hours; stop it and call it again whenever you like.

    python nbs/studies/a_to_b.py --runs reports/a_to_b --workers 2

Needs breastmnist.npz and pneumoniamnist.npz (28 x 28) in MEDXFER_DATA. Finished runs are kept in --runs; the studies are written beside this file."""
import argparse
from dataclasses import replace
from pathlib import Path

from medxfer_nb.compare import compare
from medxfer_nb.datasets import load
from medxfer_nb.strategies import transfer
from medxfer_nb.transfer import Phase, Strategy

HOME = Path(__file__).with_suffix("")
HELD = "l2_sp", "delta", "bss", "lwf", "co_tuning", "stochnorm"
MOVES = "feature_extraction", "fully_connected", "last_two", "early", "gradual", "discriminative", "full", "fine_tuning", "lp_ft"
STARTS = "scratch",  # of the strategies that start at random
TWO_HOPS = "feature_extraction", "fully_connected", "last_two", "fine_tuning", "l2_sp"
LITES = [f"tf_efficientnet_lite{i}" for i in range(3)]


def one_cycle(epochs):
    "All layers at once, one cycle, the trunk at a twentieth of the head's rate."
    return Strategy("one_cycle", "one cycle, two rates", (Phase(epochs, 4e-3, body=0.05),))


def norm_follows(net, train, rest, seed, checkpoint):
    "BatchNorm in training mode: it normalises by the batch, and moves its averages."
    net.bn_eval = False
    return train


def pneumonia_network(runs):
    "N(A): ImageNet's network, fine-tuned on PneumoniaMNIST."
    return transfer(load("pneumoniamnist"), one_cycle(4), n=None, size=96, checkpoint=runs / "source").net


def studies(runs, workers, seeds=3):
    "(name, Study) of everything that the notebook shows."
    breast, pneumonia, options = load("breastmnist"), load("pneumoniamnist"), dict(seeds=seeds, folder=runs, workers=workers)
    yield "imagenet_to_breast", compare(breast, [*STARTS, *MOVES, *HELD], "all", size=96, **options)
    sources = {"ImageNet, then PneumoniaMNIST": pneumonia_network(runs)}
    yield "pneumonia_to_breast", compare(breast, TWO_HOPS, "all", backbones=sources, **options)
    moving = replace(one_cycle(8), name="one_cycle_norm_follows", prepare=norm_follows)
    yield "batch_norm", compare(breast, [one_cycle(8), moving], "all", size=128, **options)
    yield "best_on_breast", compare(breast, [one_cycle(8)], "all", backbones=LITES, size=128, **options)
    yield "best_on_pneumonia", compare(pneumonia, [one_cycle(4)], "all", size=96, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder for finished runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    args = parser.parse_args()
    for name, study in studies(args.runs, args.workers):
        print(study)
        study.save(HOME / f"{name}.npz")


if __name__ == "__main__": main()
