"""One network for six questions, or one for each? Trains every run that multitask.ipynb reads; stop it and call it again whenever you like.

    python nbs/studies/multitask.py --runs reports/multitask --workers 2
    python nbs/studies/multitask.py --runs reports/multitask --workers 2 --only all_labels budgets   # without pairs of tasks and other balances

Finished runs are kept in --runs; the results are written beside this file, in the folder multitask, and what they hold already is not trained
again: move them away to repeat everything."""
import argparse
import itertools
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from torch.nn import functional as F

from medxfer_nb.balancing import GradNorm, PCGrad, Uncertainty
from medxfer_nb.core import atomic_write, progress
from medxfer_nb.datasets import load
from medxfer_nb.explain import explain
from medxfer_nb.multitask import Fixed, asking, predict, transfer_tasks
from medxfer_nb.surfaces import boundary_f1, dice, hausdorff95, iou, measure
from medxfer_nb.transfer import Phase, Strategy

HOME = Path(__file__).with_suffix("")
TASKS = "finding", "shape", "echo_grade", "diameter_mm", "mask", "boundary"
EPOCHS = {50: 20, 150: 10}  # of a budget; with 8 pictures a batch 140 and 190 steps
LIGHT = partial(Fixed, diameter_mm=0.1)  # the size's loss is by far the longest gradient in the pyramid: lesson balancing
FULL = "all_labels"  # the runs with all labels, at 128 px
BALANCES = dict(sum=Fixed, kendall=Uncertainty, gradnorm=GradNorm, pcgrad=PCGrad)
COLUMNS = (*(f"finding_{k}" for k in range(3)), *(f"shape_{k}" for k in range(3)), *(f"echo_grade_{k}" for k in range(4)),
           "size_mm", "size_sd", "dice", "iou", "boundary_f1", "hausdorff95", "outline_mm", "eccentricity", "solidity", "drawn", "edge_mm")


def two_rates(epochs): return Strategy("two_rates", "heads and trunk, two rates", (Phase(epochs, 3e-3, body=0.1),))


def one_rate(epochs): return Strategy("one_rate", "heads and trunk, one rate", (Phase(epochs, 1e-3),))


def data(): return asking(load("phantom/ultrasound"), "boundary")


def arms():
    "Part of the study -> its runs: (name, tasks, budget, seed)."
    sets, seeds = [TASKS, *((name,) for name in TASKS)], range(3)
    return {FULL: [(FULL, TASKS, None, s) for s in seeds],
            "budgets": [("+".join(t), t, n, s) for n, s, t in itertools.product(EPOCHS, seeds, sets)],
            "pairs": [("+".join(t), t, 150, s) for s, t in itertools.product(seeds, itertools.combinations(TASKS, 2))],
            "balances": [(name, TASKS, 150, s) for s, name in itertools.product(seeds, BALANCES)]}


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


def shown(test):
    "Six lesions of the test patients, from the smallest to the largest."
    sick = np.flatnonzero(test.target("lesion") == 1)
    return sick[np.argsort(test.target("diameter_mm")[sick], kind="stable")[np.linspace(10, len(sick) - 11, 6).astype(int)]]


def looks(net, test):
    "Where the network looks for each answer on these six (Grad-CAM, last stage)."
    part = test.images[shown(test)]
    return {f"heat_{t}": explain(net, part, task=t).heat((64, 64)).astype(np.float16) for t in TASKS}


def keep(path, **arrays):
    "Write arrays to a file, whole or not at all."
    with atomic_write(path) as part, open(part, "wb") as f: np.savez_compressed(f, **arrays)


def train(name, tasks, n, seed, file):
    "One run, unless it lies there already."
    if file.exists(): return
    torch.set_num_threads(1)
    ds, balance = data(), BALANCES.get(name) or (LIGHT if len(tasks) > 1 and "diameter_mm" in tasks else Fixed)
    strategy, options = (one_rate(30), dict(size=128)) if name == FULL else (two_rates(EPOCHS[n]), dict(size=64, batch_size=8))
    run = transfer_tasks(ds, tasks, strategy, n=n, seed=seed, checkpoint=file.with_suffix(".ckpt"), balance=balance(), **options)
    parts = {split: ds.split(split) for split in ("val", "test")}
    answers = {split: predict(run.net, part) for split, part in parts.items()}
    found = {split: table(part, answers[split]) for split, part in parts.items()} | dict(seconds=run.seconds)
    if name == FULL:
        found |= {f"{split}_{task}": v.astype(np.float32) for split, a in answers.items() for task, v in a.items()}
        found |= looks(run.net, parts["test"]) | dict(loss_mask=run.history["mask"].to_numpy())
    keep(file, **found)
    for old in file.parent.glob(f"{file.stem}.ckpt*"): old.unlink()


def together(files):
    "The runs with all labels in one file: the table of each seed, that of their mean answers, losses, and the examples."
    runs, ds = [dict(np.load(file)) for file in files], data()
    parts, found = {split: ds.split(split) for split in ("val", "test")}, {}
    mean = {split: {task: np.mean([r[f"{split}_{task}"] for r in runs], axis=0) for task in TASKS} for split in parts}
    for split, part in parts.items(): found |= {split: np.stack([r[split] for r in runs]), f"{split}_mean": table(part, mean[split])}
    rows = shown(parts["test"])
    found |= dict(rows=rows, mask=mean["test"]["mask"][rows].astype(np.float16), seconds=np.array([r["seconds"] for r in runs]))
    return found | {k: v for k, v in runs[0].items() if k.startswith("heat_")} | {"loss_mask": np.stack([r["loss_mask"] for r in runs])}


def kept():
    "What the file of the grid beside this script holds: name|budget|seed -> arrays."
    if not (HOME / "grid.npz").exists(): return {}
    grid = np.load(HOME / "grid.npz")
    parts = {name: grid[name] for name in ("val", "test", "seconds")}
    return {run: {name: part[i] for name, part in parts.items()} for i, run in enumerate(grid["runs"].tolist())}


def collect(jobs, grid):
    "All finished runs of the grid in one small file, and those with all labels in another when all three are there."
    full = [file for name, *_, file in jobs if name == FULL]
    if full and all(file.exists() for file in full): keep(HOME / f"{FULL}.npz", columns=np.array(COLUMNS), **together(full))
    done = {f"{name}|{n}|{seed}": file for name, _, n, seed, file in jobs if file.exists() and name != FULL}
    if grid := grid | {run: np.load(file) for run, file in done.items()}:
        found = {part: np.stack([run[part] for run in grid.values()]) for part in ("val", "test", "seconds")}
        keep(HOME / "grid.npz", runs=np.array(list(grid)), columns=np.array(COLUMNS), **found)


def missing(runs, parts, grid):
    "The runs that the files beside this script do not hold, each with its file in the folder of runs."
    jobs, there = [run for part in parts for run in arms()[part]], (HOME / f"{FULL}.npz").exists()
    jobs = [(*run, runs / f"{run[0].replace('+', '-')}_{run[2]}_{run[3]}.npz") for run in jobs]
    return [job for job in jobs if not (there if job[0] == FULL else f"{job[0]}|{job[2]}|{job[3]}" in grid)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder for finished runs")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--only", nargs="+", choices=list(arms()), default=list(arms()), help="parts of the study (default: all)")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    HOME.mkdir(exist_ok=True)
    start, jobs = time.perf_counter(), missing(args.runs, args.only, grid := kept())
    done = Parallel(n_jobs=args.workers, batch_size=1, pre_dispatch="all", return_as="generator_unordered")(delayed(train)(*job) for job in jobs)
    try:
        for _ in progress(done, "runs", len(jobs)): pass
    except KeyboardInterrupt: print("stopped; what is finished is kept")
    collect(jobs, grid)
    print(f"{len(jobs)} runs were missing; {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__": main()
