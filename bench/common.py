"What the players share, in both environments: a job comes in as JSON, its answer goes out as JSON."
import json
import sys

import torch

BATCH, RATE = 16, 2e-3
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def answer(work):
    "Read the job, do it with as many threads as it says, print the answer."
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    print(json.dumps(work(job)))
