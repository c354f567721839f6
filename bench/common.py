"What the programs share, in both environments: the machine they run on, and a job that comes in as JSON and goes out as JSON."
import json
import os
import platform
import re
import sys
from datetime import date
from pathlib import Path

import torch

RATE = 2e-3
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def answer(work):
    "Read the job, do it with as many threads as it says, print the answer."
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    print(json.dumps(work(job)))


def here():
    "The date and the kind of machine, for results that are committed."
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if platform.system() == "Linux" else None
    return dict(date=str(date.today()), machine=dict(cpu=cpu[1] if cpu else platform.machine(), cores=os.cpu_count(), system=platform.system()))
