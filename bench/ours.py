"Our side: the pictures for all players, the weights for all players, and a training that is timed epoch by epoch."
import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import torch
from common import answer
from PIL import Image
from safetensors.torch import save_file

from medxfer_nb.backbones import PACKAGED, create_model
from medxfer_nb.datasets import load
from medxfer_nb.loop import Callback
from medxfer_nb.speed import fastest
from medxfer_nb.strategies import ALL, HEAD, KNOWN
from medxfer_nb.training import computed_once, fit
from medxfer_nb.transfer import adopt, freeze, rates

COUNTS = dict(train=546, val=78, test=156)  # BreastMNIST's
# a phase, and whether its pictures are new views in each epoch
WORKLOADS = dict(frozen=(HEAD, False), partial=(KNOWN["last_two"].phases[-1], False), full=(ALL, True))


def data(quick=False):
    "BreastMNIST where MEDXFER_DATA says its folder, else as many simulated pictures; some of them for `quick`."
    ds = load("breastmnist" if os.environ.get("MEDXFER_DATA") else "phantom/ultrasound")
    rows = [np.flatnonzero(ds.table["split"] == split)[:64 if quick else n] for split, n in COUNTS.items()]
    return ds.take(np.concatenate(rows))


def network(name, size): return create_model(name, name in PACKAGED, num_classes=2, size=size)


def share_pictures(ds, folder):
    "The set as we use it, and as PNG files in a folder a class for the others."
    (folder / "set.pickle").write_bytes(pickle.dumps(ds))
    for i, (picture, y, split) in enumerate(zip(ds.images, ds.target(), ds.table["split"])):
        home = folder / split / str(y)
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(home / f"{i:04}.png")


@torch.no_grad()
def share_network(name, size, flip, folder):
    "The weights in order, a batch with its logits as the check, and what the others must know: normalisation, and which weights train."
    net = network(name, size)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    weights = {f"{i:04}": w.contiguous() for i, w in enumerate(net.state_dict().values())}
    save_file(weights | dict(x=x, logits=net(x)), folder / f"{name}.safetensors")
    trains = {kind: [p.requires_grad for p in freeze(net, phase.frozen).parameters()] for kind, (phase, _) in WORKLOADS.items()}
    facts = dict(mean=net.spec.mean, std=net.spec.std, flip=flip, trains=trains)
    (folder / f"{name}.json").write_text(json.dumps(facts))


class Clock(Callback):
    "Seconds of each epoch."

    def before_fit(self, loop): self.seconds = []
    def before_epoch(self, loop): self.start = time.perf_counter()
    def after_epoch(self, loop): self.seconds.append(time.perf_counter() - self.start)


def train(job):
    "Seconds of each epoch after the warm-up, and those spent once: frozen stages, and making the optimiser."
    ds, net, clock = pickle.loads(Path(job["folder"], "set.pickle").read_bytes()), network(job["network"], job["size"]), Clock()
    net.bn_eval, (phase, augmented) = job["bn"] == "still", WORKLOADS[job["workload"]]
    freeze(net, phase.frozen)
    how = fastest(net, job["batch"], computed_once(net, augmented))  # as with precision="auto": measured once for a machine
    callbacks, start = [clock, *adopt(net, how)], time.perf_counter()
    kept = dict(augmented=augmented, callbacks=callbacks, batch_size=job["batch"])
    run = fit(net, ds.split("train"), job["warm"] + job["epochs"], rates(net, phase), **kept)
    once = time.perf_counter() - start - sum(clock.seconds)
    return dict(seconds=clock.seconds[job["warm"]:], once=once, loss=run.history["loss"].tolist(), phase=phase.epochs, precision=how.precision)


if __name__ == "__main__": answer(train)
