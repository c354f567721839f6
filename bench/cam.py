"""Class activation maps without a backward pass, against the library grad-cam: from raw pictures, and from maps that are in the cache.

    python bench/cam.py                   # a batch of 16 pictures of 224 pixels; writes bench/cam.json
    python bench/cam.py --turns 2 --size 96 --quick
    python bench/cam.py --product         # every method of lesson explain on every network, at 64 pixels: does all run, and how long

All players have the same network, the same batch and the same threads, and take turns. grad-cam makes the map of one class, we make those of all
classes; the clock stops when the map of that class is clipped, as large as the pictures and scaled. grad-cam has no way to start from maps that are
there, so what it takes for the pictures is compared with what we take from the cache.
"""
import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import here
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from medxfer_nb import create_model
from medxfer_nb.cam import cam
from medxfer_nb.explain import METHODS, explain

HERE = Path(__file__).parent
NETWORKS = "small_cnn", "tf_efficientnet_lite0", "resnet18", "mobilenet_v2"  # an average and a linear head
ALL = (*NETWORKS, "alexnet", "vgg16", "googlenet", "resnet50", "mobilenet_v3_small", "mobilenet_v3_large", "vit_tiny_patch16_224")


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def finished(evidence, side):
    "The maps of class 1 as the library hands them over: clipped, as large as the pictures, scaled."
    return scale_cam_image(scale_cam_image(evidence[:, 1].clamp(min=0).numpy(), (side, side)))


def players(net, x, maps):
    "Name -> one explanation of the batch."
    library, targets = GradCAM(net, [net.cam_layer]), [ClassifierOutputTarget(1)] * len(x)
    return {"grad-cam": lambda: library(x, targets), "ours, raw": lambda: finished(cam(net, x), net.spec.size),
            "ours, cached": lambda: finished(cam(net, maps), net.spec.size), "our explain": lambda: explain(net, x, 1)}


@torch.no_grad()
def measured(name, asked):
    "The median seconds of each player, in turns, the ratios, and how far our maps are from the library's."
    net = create_model(name, pretrained=False, num_classes=2, size=asked.size).eval()
    pictures = np.random.default_rng(0).integers(0, 256, (asked.batch, asked.size, asked.size), dtype=np.uint8)
    x = net.batch(pictures)
    maps = net.feature_map(x).clone()
    with torch.enable_grad():
        works = players(net, x, maps)
        stretched = works["grad-cam"]()
        clock = {player: [] for player in works}
        for _ in range(asked.turns + 1):
            for player, work in works.items(): clock[player].append(seconds(work))
    times = {player: median(t[1:]) for player, t in clock.items()}                # the first turn warms up
    return dict(network=name, seconds=times, largest_difference_of_the_stretched_maps=float(np.abs(works["ours, raw"]() - stretched).max()),
                raw_faster=times["grad-cam"] / times["ours, raw"], cached_faster=times["grad-cam"] / times["ours, cached"])


def every_method(name):
    "Seconds of every method on one network; a map that is not finite is an error of `explain`."
    net = create_model(name, pretrained=False, num_classes=2, size=64)
    x = net.batch(np.random.default_rng(0).integers(0, 256, (2, 64, 64), dtype=np.uint8))
    layer = {"score_cam": "stem", "ablation_cam": "stem"}                           # few channels, so few passes
    return {method: round(seconds(partial(explain, net, x, 1, method, layer.get(method))), 2) for method in METHODS}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--product", action="store_true", help="all methods on all networks instead")
    parser.add_argument("--quick", action="store_true", help="see that all works; numbers are only printed")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="side of the pictures in pixels")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.product:
        for name in ALL: print(json.dumps({name: every_method(name)}), flush=True)
        return
    rows = [measured(name, asked) for name in NETWORKS]
    text = json.dumps(here() | dict(turns=asked.turns, batch=asked.batch, size=asked.size, threads=asked.threads, rows=rows), indent=1)
    print(text)
    if not asked.quick: (HERE / "cam.json").write_text(text + "\n")


if __name__ == "__main__": main()
