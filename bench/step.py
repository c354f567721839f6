"""What does a step of training consist of, and what would a larger batch or a compiler change?

    python bench/step.py               # one thread, 64 px: a minute
    python bench/step.py --compile     # also with torch.compile, which takes some minutes and a C++ compiler

prints milliseconds for 16 pictures of EfficientNet-Lite0 at 64 px, in turns, the least of eight;
and the largest parts of a step by torch's profiler.
"""
import argparse
import contextlib

import numpy as np
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from medxfer_nb.backbones import create_model
from medxfer_nb.speed import adamw, quick, seconds
from medxfer_nb.strategies import KNOWN
from medxfer_nb.training import frozen_stages
from medxfer_nb.transfer import freeze

TRAINED = {"all": "fine_tuning", "last two stages": "last_two"}  # by the last phase of a strategy


def stepper(trained, batch, half, compiled=False):
    "A function that takes one step on noise, behind what is frozen."
    net = create_model("tf_efficientnet_lite0", num_classes=2, size=64)
    net.bn_eval = True
    freeze(net, KNOWN[TRAINED[trained]].phases[-1].frozen).to(memory_format=torch.channels_last).train()
    start = frozen_stages(net)
    with torch.no_grad(): x = net.stages[:start](torch.randn(batch, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    optimiser = adamw([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    def loss(x): return net.head(net.neck(net.stages[start:](x))).float().logsumexp(1).mean()
    f = torch.compile(loss) if compiled else loss

    def step():
        with contextlib.nullcontext() if compiled else quick(), torch.autocast("cpu", torch.bfloat16, enabled=half): value = f(x)
        value.backward()
        optimiser.step(); optimiser.zero_grad()
    return step


def in_turns(steps, rounds=8):
    "The least time of each step, after two to warm up."
    for f in steps.values(): f(); f()
    return pd.Series(np.min([[seconds(f) for f in steps.values()] for _ in range(rounds)], axis=0), index=pd.Index(steps))


def parts(step, n=10):
    "Share of a step's time in each operation, in per cent."
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(n): step()
    own = pd.Series({e.key: e.self_cpu_time_total for e in seen.key_averages()})
    return (100 * own / own.sum()).nlargest(10).round(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(trained, batch, name) for trained in TRAINED for batch in (16, 32, 64) for name in ("float32", "bfloat16")]
    times = in_turns({case: stepper(*case[:2], case[2] == "bfloat16") for case in cases})
    print((times * 16e3 / times.index.get_level_values(1)).round(0).unstack().to_string(), "\n")
    if asked.compile: print((1e3 * in_turns({name: stepper("all", 16, name == "bfloat16", True) for name in ("float32", "bfloat16")})).round(0), "\n")
    print(parts(stepper("all", 16, True)).to_string())


if __name__ == "__main__": main()
