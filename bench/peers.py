"The others, in an environment of their own: fastai, a plain torchvision loop, and scikit-learn on features."
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from common import PENALTIES, RATE, answer
from fastai.vision.all import Callback, ImageDataLoaders, Learner, Normalize, OptimWrapper, Resize, accuracy, aug_transforms
from joblib import Parallel, delayed
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchvision import transforms as T


def prepared(job):
    "The network with our weights, checked to give our logits, and the facts about it."
    name, folder = job["network"], Path(job["folder"])
    make = partial(torchvision.models.get_model, name) if name in torchvision.models.list_models() else partial(timm.create_model, name)
    model, weights = make(num_classes=2), load_file(folder / f"{name}.safetensors")
    model.load_state_dict(dict(zip(model.state_dict(), (weights[key] for key in sorted(weights.keys() - {"x", "logits"})))))
    with torch.inference_mode(): torch.testing.assert_close(model.eval()(weights["x"]), weights["logits"], atol=1e-3, rtol=1e-3)
    if job["channels_last"]: model.to(memory_format=torch.channels_last)
    return model, json.loads((folder / f"{name}.json").read_text())


def still(model):
    "Every BatchNorm in evaluation mode, as ours has it in a pretrained network."
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()


class Clock(Callback):
    "Seconds of each epoch's training part; BatchNorm held still where asked for."
    order = 100

    def __init__(self, hold): self.hold, self.seconds, self.losses = hold, [], []

    def before_train(self):
        if self.hold: still(self.model)
        self.start, self.batches = time.perf_counter(), []

    def after_loss(self):
        if self.training: self.batches.append(self.loss.item())

    def after_train(self):
        self.seconds.append(time.perf_counter() - self.start)
        self.losses.append(float(np.mean(self.batches)))


def half(job):
    "torch's own way to 16 bits, where asked for."
    return torch.autocast("cpu", torch.bfloat16, enabled=job["half"])


def fastai(job):
    "fastai as its users write it; `full` is `fine_tune`, of which the frozen first epoch is not counted."
    model, facts = prepared(job)
    whole, clock, epochs = job["workload"] == "full", Clock(job["bn"] == "still"), job["warm"] + job["epochs"]
    trains = facts["trains"]["frozen" if whole else job["workload"]]
    views = aug_transforms(do_flip=facts["flip"], max_rotate=10, min_zoom=0.9, max_zoom=1.1, max_lighting=0.2, max_warp=0)
    views = [*(views if whole else ()), Normalize.from_stats(facts["mean"], facts["std"])]
    dls = ImageDataLoaders.from_folder(Path(job["folder"]), "train", "val", item_tfms=Resize(job["size"]), batch_tfms=views, bs=job["batch"],
                                       device=torch.device("cpu"), num_workers=job["workers"], drop_last=False)  # all pictures, as we
    def split(model): return [[p for p, on in zip(model.parameters(), trains) if on == part] for part in (False, True)]
    learn = Learner(dls, model, nn.CrossEntropyLoss(), partial(OptimWrapper, opt=torch.optim.AdamW), RATE, split, cbs=clock, metrics=accuracy,
                    train_bn=not clock.hold)
    with learn.no_bar(), learn.no_logging(), half(job):
        if whole: learn.fine_tune(epochs, RATE)
        else:
            learn.freeze()
            learn.fit_one_cycle(epochs, RATE)
    return dict(seconds=clock.seconds[-job["epochs"]:], loss=clock.losses, accuracy=learn.recorder.values[-1][-1])


def plain(job):
    "The loop of a tutorial: ImageFolder, DataLoader, AdamW."
    model, facts = prepared(job)
    for p, on in zip(model.parameters(), facts["trains"][job["workload"]]): p.requires_grad_(on)
    views = [T.RandomAffine(10, (0.08, 0.08), (0.9, 1.1)), T.ColorJitter(0.2, 0.2), *[T.RandomHorizontalFlip()] * facts["flip"]]
    views = [T.Resize(job["size"]), *(views if job["workload"] == "full" else ()), T.ToTensor(), T.Normalize(facts["mean"], facts["std"])]
    pictures = torchvision.datasets.ImageFolder(Path(job["folder"], "train"), T.Compose(views))
    loader = torch.utils.data.DataLoader(pictures, job["batch"], shuffle=True, num_workers=job["workers"], persistent_workers=job["workers"] > 0)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE)
    with half(job): epochs = [one_epoch(model, loader, optimiser, job["bn"] == "still") for _ in range(job["warm"] + job["epochs"])]
    return dict(seconds=[s for s, _ in epochs[job["warm"]:]], loss=[loss for _, loss in epochs])


def one_epoch(model, loader, optimiser, hold):
    "Seconds and mean loss."
    start, total = time.perf_counter(), 0.0
    model.train()
    if hold: still(model)
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad(); loss.backward(); optimiser.step()
        total += loss.item() * len(y)
    return time.perf_counter() - start, total / len(loader.dataset)


def sklearn(job):
    "For each draw: scaling, the penalty by cross-validation over patients, and the fit; as many draws at a time as threads."
    f = np.load(Path(job["folder"], "features.npz"))
    x, y, groups, start = f["x"], f["y"], f["groups"], time.perf_counter()
    fitted = Parallel(job["threads"])(delayed(search)(x[rows], y[rows], groups[rows]) for rows in np.split(f["rows"], f["cuts"]))
    seconds = time.perf_counter() - start
    np.save(Path(job["folder"], "theirs.npy"), [model.predict_proba(f["test"]) for model in fitted])
    return dict(seconds=seconds, C=[model[-1].C for model in fitted])


def search(x, y, groups):
    "The pipeline with the penalty of the least mean log loss over at most five folds; with too few patients, with the middle one."
    model, k = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTIES[2], max_iter=2000)), min(5, *np.bincount(y), len(np.unique(groups)))
    if k < 2: return model.fit(x, y)
    folds = StratifiedGroupKFold(k, shuffle=True, random_state=0).split(x, y, groups)
    folds = [(a, b) for a, b in folds if len(set(y[a])) == len(set(y)) == len(set(y[b]))]
    return GridSearchCV(model, {"logisticregression__C": PENALTIES}, scoring="neg_log_loss", cv=folds).fit(x, y).best_estimator_


if __name__ == "__main__": answer(lambda job: dict(fastai=fastai, torchvision=plain, sklearn=sklearn)[job["player"]](job))
