"What the machine can do at most, and what one training step asks of it."
import time

import torch
from common import answer
from ours import WORKLOADS, network
from torch.utils.flop_counter import FlopCounterMode

from medxfer_nb.training import frozen_stages
from medxfer_nb.transfer import freeze


def least(work, seconds=2.0):
    "Fewest seconds of one call, over some seconds of calls."
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        work()
        best = min(best, time.perf_counter() - start)
    return best


def rate(dtype, n=2048):
    "GFLOP/s of the product of two square matrices."
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    return 2 * n**3 / least(lambda: a @ b) / 1e9


def copy_rate(n=2**26):
    "GB/s, read and written, of a copy of 256 MB."
    a, b = torch.zeros(2, n)
    return 2 * 4 * n / least(lambda: b.copy_(a)) / 1e9


@torch.no_grad()
def step(name, size, batch):
    "GFLOP of a training step of all weights, and GB in and out of every layer: thrice those forward; and which share of it `partial` trains."
    net, traffic = network(name, size).train(), []
    first = frozen_stages(freeze(net, WORKLOADS["partial"][0].frozen))
    def count(module, x, y): traffic.append(sum(t.numel() * t.element_size() for t in (*x, y)))
    for m in net.modules():
        if not next(m.children(), None): m.register_forward_hook(count)
    with FlopCounterMode(display=False) as before: x = net.stages[:first](torch.randn(batch, 3, size, size))
    with FlopCounterMode(display=False) as after: net.head(net.neck(net.stages[first:](x)))
    total = before.get_total_flops() + after.get_total_flops()
    return dict(gflop=3 * total / 1e9, gb=3 * sum(traffic) / 1e9, partial=after.get_total_flops() / total)


def ceiling(job):
    "The machine's rates with so many threads, and what a step of each network needs."
    rates = dict(float32=rate(torch.float32), bfloat16=rate(torch.bfloat16), copy=copy_rate())
    return rates | dict(steps={name: step(name, job["size"], job["batch"]) for name in job["networks"]})


if __name__ == "__main__": answer(ceiling)
