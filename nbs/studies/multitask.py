"""One network for six questions, or one for each? Trains every run that multitask.ipynb reads; stop it and call it again whenever you like.

    python nbs/studies/multitask.py --runs reports/multitask --workers 2

Finished runs are kept in --runs; the results are written beside this file, in the folder multitask, and what they hold already is not trained
again: move them away to repeat everything."""
import argparse
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from torch.nn import functional as F

from medxfer_nb.balancing import GradNorm, PCGrad, Uncertainty
from medxfer_nb.core import atomic_write, progress
from medxfer_nb.datasets import load
from medxfer_nb.multitask import Fixed, asking, predict, transfer_tasks
from medxfer_nb.surfaces import boundary_f1, dice, hausdorff95, iou, measure
from medxfer_nb.transfer import Phase, Strategy

HOME = Path(__file__).with_suffix("")
TASKS = "finding", "shape", "echo_grade", "diameter_mm", "mask", "boundary"
EPOCHS = {50: 20, 150: 10}  # of a budget; with 8 pictures a batch 140 and 190 steps
LIGHT = partial(Fixed, diameter_mm=0.1)  # the size's loss is by far the longest gradient in the pyramid: lesson balancing
FULL = dict(full=(25, Fixed), full_light=(30, LIGHT))  # epochs and balance of the runs with all labels at 128 px
BALANCES = dict(sum=Fixed, kendall=Uncertainty, gradnorm=GradNorm, pcgrad=PCGrad)
COLUMNS = (*(f"finding_{k}" for k in range(3)), *(f"shape_{k}" for k in range(3)), *(f"echo_grade_{k}" for k in range(4)),
           "size_mm", "size_sd", "dice", "iou", "boundary_f1", "hausdorff95", "outline_mm", "eccentricity", "solidity", "drawn", "edge_mm")


def two_rates(epochs): return Strategy("two_rates", "heads and trunk, two rates", (Phase(epochs, 3e-3, body=0.1),))


def one_rate(epochs): return Strategy("one_rate", "heads and trunk, one rate", (Phase(epochs, 1e-3),))


def data(): return asking(load("phantom/ultrasound"), "boundary")


def arms():
    "Every run in the order of its importance: (name, tasks, budget, seed)."
    sets = [TASKS, *((name,) for name in TASKS)]
    pairs = [*sets, *itertools.combinations(TASKS, 2)]
    few = [("+".join(t), t, 50, s) for s in range(3) for t in sets]
    more = [run for s in range(3) for run in [*(("+".join(t), t, 150, s) for t in pairs), *((name, TASKS, 150, s) for name in BALANCES)]]
    return [*((name, TASKS, None, 0) for name in FULL), *few, *more]


def table(ds, answers):
    "A row a picture, a column an answer or how good it is; NaN where the network was not asked."
    out, mm = {}, ds.table["spacing_mm"].to_numpy()
    for name in ("finding", "shape", "echo_grade"):
        if name in answers: out |= {f"{name}_{k}": p for k, p in enumerate(answers[name].T)}
    if "diameter_mm" in answers: out |= dict(zip(("size_mm", "size_sd"), answers["diameter_mm"].T))
    if "mask" in answers:
        p, found = answers["mask"], measure(answers["mask"], mm)
        out |= dict(dice=dice(p, ds.masks), iou=iou(p, ds.masks), boundary_f1=boundary_f1(p, ds.masks, mm), hausdorff95=hausdorff95(p, ds.masks, mm))
        out |= dict(outline_mm=found["diameter_mm"], eccentricity=found["eccentricity"], solidity=found["solidity"], drawn=(p > 0.5).any((1, 2)))
    if "boundary" in answers: out["edge_mm"] = edge_error(answers["boundary"], ds.masks)
    return np.stack([np.asarray(out[c], np.float16) if c in out else np.full(len(ds), np.nan, np.float16) for c in COLUMNS], 1)


def edge_error(far, masks):
    "Mean over the true outline of how far from it (mm) the network believes to be; NaN without a lesion."
    m = torch.tensor(np.asarray(masks))[:, None].float()
    edge = (F.max_pool2d(m, 3, 1, 1) - m).bool()[:, 0].numpy()
    return np.array([np.abs(f[e]).mean() if e.any() else np.nan for f, e in zip(far, edge)])


def heat(net, x):
    "Name -> (B, 128, 128): which places of the last map each answer depends on (Grad-CAM: Selvaraju et al. 2017), as a share of the largest."
    maps = [m.detach() for m in net.maps(x)]
    last = maps[-1].requires_grad_()
    best = lambda z: z.max(1).values  # noqa: E731
    sought = dict(finding=best, shape=best, echo_grade=best, diameter_mm=lambda z: z[:, 0],
                  mask=lambda z: z.flatten(1).max(1).values, boundary=lambda z: -z.flatten(1).min(1).values)
    found = {}
    for name, out in net.outputs(x, [*maps[:-1], last]).items():
        (slope,) = torch.autograd.grad(sought[name](out).sum(), last, retain_graph=True)
        cam = F.relu((slope.mean((2, 3), keepdim=True) * last).sum(1, keepdim=True)).detach()
        cam = F.interpolate(cam, (128, 128), mode="bilinear")[:, 0]
        found[name] = (cam / cam.amax((1, 2), keepdim=True).clip(1e-9)).numpy().astype(np.float16)
    return found


def examples(net, test):
    "Six lesions of the test patients, from the smallest to the largest: what the network draws, and where it looks."
    sick = np.flatnonzero(test.target("lesion") == 1)
    rows = sick[np.argsort(test.target("diameter_mm")[sick], kind="stable")[np.linspace(10, len(sick) - 11, 6).astype(int)]]
    some = test.take(rows)
    p = predict(net, some)
    return dict(rows=rows, mask=p["mask"].astype(np.float16)) | {f"heat_{name}": h for name, h in heat(net, net.batch(some.images)).items()}


def keep(path, **arrays):
    "Write arrays to a file, whole or not at all."
    with atomic_write(path) as part, open(part, "wb") as f: np.savez_compressed(f, **arrays)


def train(name, tasks, n, seed, file):
    "One run, unless it lies there already."
    if file.exists(): return
    torch.set_num_threads(1)
    ds = data()
    epochs, balance = FULL.get(name) or (EPOCHS[n], BALANCES.get(name) or (LIGHT if "+" in name and "diameter_mm" in tasks else Fixed))
    strategy, options = (one_rate(epochs), dict(size=128)) if name in FULL else (two_rates(epochs), dict(size=64, batch_size=8))
    run = transfer_tasks(ds, tasks, strategy, n=n, seed=seed, checkpoint=file.with_suffix(".ckpt"), balance=balance(), **options)
    parts = {split: ds.split(split) for split in ("val", "test")}
    found = {split: table(part, predict(run.net, part)) for split, part in parts.items()} | dict(seconds=run.seconds)
    if name in FULL:
        found |= {f"loss_{k}": v.to_numpy() for k, v in run.history.items()}
        found |= {f"example_{k}": v for k, v in examples(run.net, parts["test"]).items()}
    keep(file, **found)
    for old in file.parent.glob(f"{file.stem}.ckpt*"): old.unlink()


def kept():
    "What the file of the grid beside this script holds: name|budget|seed -> arrays."
    if not (HOME / "grid.npz").exists(): return {}
    grid = np.load(HOME / "grid.npz")
    parts = {name: grid[name] for name in ("val", "test", "seconds")}
    return {run: {name: part[i] for name, part in parts.items()} for i, run in enumerate(grid["runs"].tolist())}


def collect(jobs, grid):
    "All finished runs of the grid in one small file, and each with all labels in one."
    new = {f"{name}|{n}|{seed}": np.load(file) for name, _, n, seed, file in jobs if file.exists() and name not in FULL}
    grid = grid | new
    found = {part: np.stack([run[part] for run in grid.values()]) for part in ("val", "test", "seconds")}
    keep(HOME / "grid.npz", runs=np.array(list(grid)), columns=np.array(COLUMNS), **found)
    for name, *_, file in jobs:
        if name in FULL and file.exists(): keep(HOME / f"{name}.npz", columns=np.array(COLUMNS), **np.load(file))


def missing(runs, grid):
    "The runs that the files beside this script do not hold, each with its file in the folder of runs."
    jobs = [(name, tasks, n, seed, runs / f"{name.replace('+', '-')}_{n}_{seed}.npz") for name, tasks, n, seed in arms()]
    jobs = {job[-1]: job for job in jobs}.values()
    return [job for job in jobs if f"{job[0]}|{job[2]}|{job[3]}" not in grid and not (job[0] in FULL and (HOME / f"{job[0]}.npz").exists())]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder for finished runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    HOME.mkdir(exist_ok=True)
    jobs = missing(args.runs, grid := kept())
    done = Parallel(n_jobs=args.workers, batch_size=1, pre_dispatch="all", return_as="generator_unordered")(delayed(train)(*job) for job in jobs)
    try:
        for _ in progress(done, "runs", len(jobs)): pass
    except KeyboardInterrupt: print("stopped; what is finished is kept")
    collect(jobs, grid)


if __name__ == "__main__": main()
