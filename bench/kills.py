"""Kill a training at random moments, also while it writes a checkpoint, resume it to the end, and compare it with an undisturbed one.

    python bench/kills.py --trials 100

prints how many trainings were killed, how many of the kills fell into a save, how many checkpoints could not be loaded (must be 0) and how
many of the resumed histories and weights are bit for bit those of the undisturbed training (must be all).
"""
import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from medxfer_nb.backbones import create_model
from medxfer_nb.imageset import ImageSet, Info, Task
from medxfer_nb.training import fit


def pictures(n=48):
    "Bright and dark squares of noise."
    rng, y = np.random.default_rng(0), np.arange(n) % 2
    images = (rng.integers(0, 100, (n, 32, 32)) + 60 * y[:, None, None]).astype(np.uint8)
    table = pd.DataFrame(dict(id=range(n), group=range(n), split="train", bright=y))
    return ImageSet(images, table, {"bright": Task("bright", "binary", ("no", "yes"))}, Info("squares", "squares", "none", "CC0", "here"))


def train(file, ds, every):
    "The training under test: augmentation and BatchNorm, a save `every` so many seconds."
    net = create_model("small_cnn", pretrained=False, num_classes=2, size=32)
    return fit(net, ds, epochs=6, batch_size=8, checkpoint=file, every=every)


def outcome(run): return [v.hex() for v in run.history["loss"]], [v.numpy().tobytes() for v in run.net.state_dict().values()]


def child(*args):
    "Train in a process of its own; returns its number."
    if pid := os.fork(): return pid
    train(*args)
    os._exit(0)


def running(pid): return os.waitpid(pid, os.WNOHANG) == (0, 0)


def kill(pid, file, in_a_save, moment):
    "Kill after `moment` seconds, or in the next save after it; returns whether it still ran and whether a save was under way."
    alive = running(pid)
    while alive and (time.perf_counter() < moment or in_a_save and not list(file.parent.glob(".*.part"))): alive = running(pid)
    if not alive: return False, False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True, bool(list(file.parent.glob(".*.part")))


def loads(file):
    "Whether the checkpoint can be read, if there is one."
    try: return not file.exists() or bool(torch.load(file, weights_only=True))
    except Exception: return False


def trial(number, folder, ds, seconds):
    "One training with kills until it ends by itself: kills, kills in a save, unloadable checkpoints, and the outcome."
    file, chance, every, counts = folder / f"{number}.ckpt", random.Random(number), (0, 0.02, 60)[number % 3], np.zeros(3, int)
    for k in range(1 + number % 2):
        alive, saving = kill(child(file, ds, every), file, k % 2 and every < 60, time.perf_counter() + chance.uniform(0, seconds))
        counts += (alive, saving, not loads(file))
        for part in folder.glob(".*.part"): part.unlink()
    return *counts.tolist(), outcome(train(file, ds, every))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # a forked child cannot use the threads of its parent
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        ds, start = pictures(), time.perf_counter()
        expected = outcome(train(None, ds, 60))
        seconds = time.perf_counter() - start
        trials = [trial(i, Path(folder), ds, seconds) for i in range(asked.trials)]
    killed, saving, unloadable, ends = zip(*trials)
    print(json.dumps({"trials": len(trials), "killed": sum(killed), "killed in a save": sum(saving), "unloadable": sum(unloadable),
                      "identical": sum(end == expected for end in ends)}))


if __name__ == "__main__": main()
