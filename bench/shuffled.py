"""The control of the whole comparison: studies whose labels are shuffled by patient must end in "no evidence".

    python bench/shuffled.py --studies 100

Each study compares linear probes on two real backbones, five seeds, with other shuffled labels; there is nothing to learn, so every other verdict is
a false alarm. Prints the words and how often each was said.
"""
import argparse
import json
from collections import Counter

from medxfer_nb import compare, load

BACKBONES = "tf_efficientnet_lite0", "tf_efficientnet_lite1"


def word(ds, n, seeds, size):
    "The verdict on one shuffled data set."
    study = compare(ds, ["feature_extraction"], n, seeds, BACKBONES, size=size)
    return study.verdict(*study.arms).word


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="phantom/ultrasound")
    parser.add_argument("--studies", type=int, default=100)
    parser.add_argument("--labels", type=int, default=100, help="labelled images a run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", type=int, default=64)
    asked = parser.parse_args()
    ds = load(asked.data)
    words = Counter(word(ds.shuffled(i), asked.labels, asked.seeds, asked.size) for i in range(asked.studies))
    print(json.dumps(vars(asked) | dict(words=words)))


if __name__ == "__main__": main()
