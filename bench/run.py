"""The whole benchmark: the machine's ceiling, epochs against fastai and a plain loop, probes against scikit-learn, and the label study.

    python bench/run.py            # what `make bench` runs; writes bench/results.json and the tables of bench/README.md
    python bench/run.py --quick    # minutes: a few pictures, a few epochs, to see that all works; its numbers are worth nothing and are only printed
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
from common import here
from ours import WORKLOADS, data, share_network, share_pictures
from report import HERE, epochs, markdown, tables, write

NETWORKS = ("tf_efficientnet_lite0", "resnet18")
CASES = [dict(network="tf_efficientnet_lite0", threads=2, bn="still"), dict(network="tf_efficientnet_lite0", threads=2, bn="follows"),
         dict(network="tf_efficientnet_lite0", threads=1, bn="still"), dict(network="resnet18", threads=2, bn="still")]
TRIES = [dict(workers=w, channels_last=c, half=h)
         for w, c, h in ((0, False, False), (0, True, False), (2, True, False), (0, True, True))]  # the first is the usual way
PLAYERS = dict(ours=[{}], fastai=TRIES, torchvision=TRIES)


def ask(script, **job):
    "The answer of a player, which runs alone, with a fresh cache."
    python = HERE.parent / ".venv-bench/bin/python" if script == "peers" else sys.executable
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | dict(OMP_NUM_THREADS=str(job["threads"]), MEDXFER_CACHE=cache)
        done = subprocess.run([python, HERE / f"{script}.py", json.dumps(job)], env=env, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{script} failed on {job}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(job, turns):
    "Each player's epochs over all turns; in the first, the others try all ways, and keep the fastest."
    ways, found, usual = dict(PLAYERS), {player: [] for player in PLAYERS}, {}
    for _, player in product(range(turns), PLAYERS):
        answers = [ask("ours" if player == "ours" else "peers", player=player, **job, **way) for way in ways[player]]
        usual.setdefault(player, min(answers[0]["seconds"]))
        best = min(range(len(answers)), key=lambda i: min(answers[i]["seconds"]))
        ways[player] = [ways[player][best]]
        found[player].append(answers[best])
    return {player: summary(answers) | dict(usual=usual[player]) | ways[player][0] for player, answers in found.items()}


def summary(answers):
    "Least and median seconds of an epoch; the first and the last loss; what was spent once."
    seconds = np.concatenate([a["seconds"] for a in answers])
    facts = {key: answers[-1][key] for key in ("accuracy", "phase", "precision") if key in answers[-1]}
    if "once" in answers[0]: facts["once"] = min(a["once"] for a in answers)
    return dict(min=seconds.min(), median=float(np.median(seconds)), n=len(seconds), loss=[answers[-1]["loss"][i] for i in (0, -1)]) | facts


def probes(ds, folder, **options):
    "Our probes and scikit-learn's on the same features: seconds, and how far apart their answers are."
    from engine import engine

    ours, theirs = engine(ds, folder, **options), ask("peers", player="sklearn", folder=str(folder), threads=os.cpu_count())
    apart = np.abs(np.load(folder / "ours.npy") - np.load(folder / "theirs.npy")).max()
    same = np.isclose(ours.pop("C"), theirs["C"]).mean()
    return ours | dict(sklearn=theirs["seconds"], same_penalty=same, apart=apart)


def facts(ds, asked):
    "When, where, on what."
    names = ("torch", "torchvision", "timm", "scikit-learn", "medxfer_nb")
    pins = dict(line.split("==") for line in (HERE / "requirements.txt").read_text().splitlines() if "==" in line)
    train = int((ds.table["split"] == "train").sum())
    return here() | dict(versions={n: version(n) for n in names} | dict(fastai=pins["fastai"]),
                         data=dict(name=ds.info.name, train=train), size=asked.size, batch=asked.batch, turns=asked.turns)


def measure(asked):
    "All parts, one after the other."
    from label_efficiency import label_efficiency

    ds, quick, rows = data(asked.quick), asked.quick, []
    cases, turns, timed = ([CASES[0] | dict(threads=1)], 1, 1) if quick else (CASES[:asked.cases], asked.turns, asked.epochs)
    results = facts(ds, asked) | dict(epochs=rows)
    with tempfile.TemporaryDirectory() as home:
        folder, os.environ["MEDXFER_DEVICE"], os.environ["MEDXFER_CACHE"] = Path(home), "cpu", f"{home}/cache"  # nothing is there yet
        share_pictures(ds, folder)
        for name in NETWORKS: share_network(name, asked.size, ds.info.flip, folder)
        results["ceiling"] = {str(t): ask("ceiling", threads=t, networks=NETWORKS, size=asked.size, batch=asked.batch) for t in (1, 2)}
        for case, workload in product(cases, asked.workloads or WORKLOADS):
            job = case | dict(workload=workload, folder=home, size=asked.size, batch=asked.batch, warm=1, epochs=timed)
            rows.append(case | dict(workload=workload, players=take_turns(job, turns)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if asked.workloads: return results
        results["probes"] = probes(ds, folder, size=asked.size, **(dict(budgets=(10, 20, "all"), seeds=2) if quick else {}))
        small, whole = dict(size=32, budgets=(10, 20), seeds=1), dict(size=asked.study_size, save=asked.save)
        results["study"] = label_efficiency(ds, **(small if quick else whole))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="see that all works; numbers are only printed")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many of the cases at the top of this file")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="only epochs of these; numbers are only printed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="timed epochs a turn, after one to warm up")
    parser.add_argument("--size", type=int, default=96, help="side of the pictures in pixels, of epochs and probes")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step of the epochs")
    parser.add_argument("--study-size", type=int, default=48, help="the same for the label study")
    parser.add_argument("--save", help="a file for the label study, *.npz")
    asked, start = parser.parse_args(), time.perf_counter()
    results = measure(asked)
    results["minutes"] = (time.perf_counter() - start) / 60
    if asked.workloads: return print(markdown(epochs(results)))
    print(tables(results))
    if asked.quick: return
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write(results)


if __name__ == "__main__": main()
