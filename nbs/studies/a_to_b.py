"""From A to B on real data: trains every run of the study that a_to_b.ipynb reads. Hours; stop it and call it again whenever you like.

    python nbs/studies/a_to_b.py --runs reports/a_to_b --workers 2

Needs breastmnist.npz and pneumoniamnist.npz (28 x 28) in MEDXFER_DATA. Finished runs are kept in --runs; the studies are written beside this file,
and what they hold already is not trained again: move them away to repeat everything."""
import argparse
from dataclasses import replace
from pathlib import Path

from medxfer_nb.compare import compare
from medxfer_nb.datasets import load
from medxfer_nb.strategies import transfer
from medxfer_nb.study import load_study
from medxfer_nb.transfer import Phase, Strategy

HOME = Path(__file__).with_suffix("")
HELD = "l2_sp", "delta", "bss", "lwf", "co_tuning", "stochnorm"
MOVES = "feature_extraction", "fully_connected", "last_two", "early", "gradual", "discriminative", "full", "fine_tuning", "lp_ft"
STARTS = "scratch", "sensitive", "mean_var"  # at random: a small network, the same network, and with the source's means and variances
TWO_HOPS = "feature_extraction", "fully_connected", "last_two", "gradual", "discriminative", "full", "fine_tuning", "lp_ft", "l2_sp"
NAMES = "best_on_breast", "best_on_pneumonia", "imagenet_to_breast", "pneumonia_to_breast", "batch_norm"
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


def arms(name, runs):
    "What `compare` is asked for in one of the studies: data, strategies, options."
    moving = replace(one_cycle(8), name="one_cycle_norm_follows", prepare=norm_follows)
    asked = {
        "best_on_breast": lambda: ("breastmnist", [one_cycle(8)], dict(backbones=LITES, size=128)),
        "best_on_pneumonia": lambda: ("pneumoniamnist", [one_cycle(4)], dict(size=96)),
        "imagenet_to_breast": lambda: ("breastmnist", [*STARTS, *MOVES, *HELD], dict(size=96)),
        "pneumonia_to_breast": lambda: ("breastmnist", TWO_HOPS, dict(backbones={"ImageNet, then PneumoniaMNIST": pneumonia_network(runs)})),
        "batch_norm": lambda: ("breastmnist", [one_cycle(8), moving], dict(size=128)),
    }
    return asked[name]()


def study(name, runs, workers, seeds):
    "One study; the runs that lie beside this file already are taken over."
    data, strategies, options = arms(name, runs)
    file = HOME / f"{name}.npz"
    known = load_study(file) if file.exists() else None
    seeds = max(seeds, known.seeds) if known else seeds  # what is there is never thrown away
    return compare(load(data), strategies, "all", seeds=seeds, folder=runs, workers=workers, known=known, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder for finished runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--seeds", type=int, default=3, help="runs an arm (default: 3, or as many as the file beside this script has)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="studies to do (default: all)")
    args = parser.parse_args()
    for name in args.only:
        done = study(name, args.runs, args.workers, args.seeds)
        print(done)
        done.save(HOME / f"{name}.npz")


if __name__ == "__main__": main()
