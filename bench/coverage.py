"""Count how often 95 % intervals hold the truth, on simulated test sets with a known truth.

    python bench/coverage.py --sets 500

prints one JSON object a row: the setting, the method, the coverage, the misses on either side (all in percent) and the mean width; `--csv
bench/coverage.csv` writes the rows as a table, with the date and the versions. The intervals are those of lessons metrics and intervals; all test
sets of a setting share the resamples, which changes nothing on average and saves most of the time. Scores are normal in both classes, with 0.6 of
their variance shared by the images of a patient; the count of sick patients is drawn by chance, at least two patients of each class.
"""
import argparse
import csv
import datetime
import itertools
import json
import platform
import sys
import time

import numpy as np
import scipy
from scipy.stats import norm

import medxfer_nb
from medxfer_nb.intervals import bca_interval, delong, delong_covariance, delong_difference, proportion
from medxfer_nb.metrics import accuracy, auroc, balanced_accuracy, checked, interval, logit_interval, resamples, score

TRUTHS = (0.75, 0.85, 0.95)


def normal(rng, groups, alike):
    "A normal number for each image, of which images of one patient share a part."
    return np.sqrt(alike) * rng.normal(size=groups[-1] + 1)[groups] + np.sqrt(1 - alike) * rng.normal(size=len(groups))


def labels(rng, groups, prevalence, of_patient):
    "0 or 1 for each image, with at least two patients of each class; one label a patient, or one an image."
    while True:
        y = rng.random(groups[-1] + 1)[groups] < prevalence if of_patient else rng.random(len(groups)) < prevalence
        if min(len(np.unique(groups[y])), len(np.unique(groups[~y]))) > 1: return y.astype(int)


def summary(draws, patients):
    "The draws that hold every class, and the standard error that they give."
    draws = draws[~np.isnan(draws)]
    return draws, draws.std() * np.sqrt(patients / (patients - 1))


def of_one(metric, y, p, groups, w, w_image):
    "method -> (low, high) for one metric on one test set; by patient, and by image where patients repeat."
    y, p, groups = checked(y, p, groups)
    value, patients = float(metric.values(y, p, np.ones((1, len(y))))[0]), groups.max() + 1
    hits, found = int((p.argmax(1) == y).sum()), {}
    if metric is accuracy: found |= {name: proportion(hits, len(y), method=name) for name in ("exact", "wilson")}
    if metric is auroc: found["DeLong, logit, t"] = delong(y, p, groups)
    if metric is auroc and patients < len(y): found["DeLong, logit, t; by image"] = delong(y, p)
    found = {name: (s.low, s.high) for name, s in found.items()}
    if value == 1:
        exact = score(metric, y, p, groups, n_boot=100)
        return found | dict.fromkeys(methods(metric, patients < len(y)) - set(found), (exact.low, exact.high))
    draws, se = summary(metric.values(y, p, w), patients)
    without = metric.values(y, p, 1.0 - (np.arange(patients)[:, None] == groups))
    found |= {"percentile": interval(draws)[:2], "BCa": bca_interval(value, draws, without[~np.isnan(without)])}
    found["logit bootstrap, t"] = logit_interval(value, se, patients - 1)
    if metric is auroc: found["DeLong, plain"] = plain(y, p, groups, value)
    if patients < len(y): found["percentile; by image"] = interval(metric.values(y, p, w_image))[:2]
    return found


def plain(y, p, groups, value):
    "The interval of many packages: value and normal standard errors on the scale itself."
    se = np.sqrt(delong_covariance(y == 1, p[None, :, 1], groups)[1].sum())
    return value - norm.ppf(0.975) * se, value + norm.ppf(0.975) * se


def methods(metric, repeated):
    "The methods that resample, for a metric with or without repeated patients."
    some = {"DeLong, plain": metric is auroc, "percentile; by image": repeated}
    return {"percentile", "BCa", "logit bootstrap, t", *(name for name, there in some.items() if there)}


def one(rng, setting, w, w_image):
    "method -> (low, high) on a new test set."
    groups, true, metric = setting["groups"], setting["truth"], setting["metric"]
    y = labels(rng, groups, setting["prevalence"], setting["of_patient"])
    d = np.sqrt(2) * norm.ppf(true) if metric is auroc else 2 * norm.ppf(true)
    return of_one(metric, y, norm.cdf(normal(rng, groups, 0.6) + d * y - d / 2), groups, w, w_image)


def two(rng, setting, w, w_image):
    "method -> (low, high) of the difference of two networks on a new test set; their scores correlate by 0.6."
    groups, (a, b) = setting["groups"], setting["pair"]
    y = labels(rng, groups, setting["prevalence"], setting["of_patient"])
    first = normal(rng, groups, 0.6)
    second = 0.6 * first + 0.8 * normal(rng, groups, 0.6)
    p_a, p_b = (norm.cdf(s + np.sqrt(2) * norm.ppf(t) * y) for s, t in ((first, a), (second, b)))
    found = delong_difference(y, p_a, p_b, groups).effect
    draws, _ = summary(auroc.values(*checked(y, p_a)[:2], w) - auroc.values(*checked(y, p_b)[:2], w), groups[-1] + 1)
    return {"percentile, paired": interval(draws)[:2], "DeLong, paired": (found.low, found.high)}


def settings():
    "Every setting: what is measured, on how many patients and images, with what truth."
    base = [dict(metric=metric, patients=n, each=1, prevalence=prevalence, truth=t, of_patient=True)
            for metric, n, prevalence, t in itertools.product((auroc, accuracy, balanced_accuracy), (50, 100, 200), (0.3, 0.5), TRUTHS)
            if metric is not accuracy or prevalence == 0.3]  # the accuracy of these networks does not depend on the prevalence
    repeated = [dict(metric=metric, patients=n, each=3, prevalence=0.3, truth=t, of_patient=of_patient)
                for metric, n, t, of_patient in itertools.product((auroc, accuracy, balanced_accuracy), (17, 33, 50), TRUTHS, (True, False))
                if metric is auroc or of_patient]
    sizes, truths = ((50, 1), (100, 1), (200, 1), (33, 3)), ((0.85, 0.85), (0.95, 0.95), (0.85, 0.75), (0.95, 0.85))
    pairs = [dict(metric=None, patients=n, each=each, prevalence=0.3, truth=pair[0] - pair[1], pair=pair, of_patient=True)
             for (n, each), pair in itertools.product(sizes, truths)]
    return base + repeated + pairs


def measure(setting, sets, n_boot):
    "Rows of the table for one setting."
    setting["groups"] = np.repeat(np.arange(setting["patients"]), setting["each"])
    rng, draw = np.random.default_rng(1), one if setting["metric"] else two
    w, w_image = (np.concatenate(list(resamples(g, n_boot))).astype(float) for g in (setting["groups"], np.arange(len(setting["groups"]))))
    found = [draw(rng, setting, w, w_image) for _ in range(sets)]
    what = setting["metric"].name if setting["metric"] else "AUROC {} - AUROC {}".format(*setting["pair"])
    facts = {"what": what, "images": len(setting["groups"]), "patients": setting["patients"], "prevalence": setting["prevalence"],
             "label of": "patient" if setting["of_patient"] else "image", "truth": round(setting["truth"], 4)}
    return [facts | row(name, [f[name] for f in found if f[name][0] is not None], setting["truth"], sets) for name in sorted(found[0])]


def row(name, ends, truth, sets):
    "What one method did: coverage, misses in percent, and mean width; 1e-9 forgives rounding."
    low, high = np.array(ends).T
    shares = {"truth below": np.mean(truth < low - 1e-9), "truth above": np.mean(truth > high + 1e-9)}
    shares = {"coverage": 1 - sum(shares.values())} | shares
    return {"method": name} | {k: round(100 * v, 1) for k, v in shares.items()} | {"width": round(np.mean(high - low), 3), "sets": len(ends)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=500)
    parser.add_argument("--boot", type=int, default=500, help="resamples of the patients")
    parser.add_argument("--csv", help="also write the table to this file")
    asked, start = parser.parse_args(), time.perf_counter()
    rows = []
    for setting in settings():
        rows += (new := measure(setting, asked.sets, asked.boot))
        print(*map(json.dumps, new), sep="\n", flush=True)
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if not asked.csv: return
    with open(asked.csv, "w", newline="") as f:
        f.write(f"# {datetime.date.today()}, {asked.sets} test sets a row, {asked.boot} resamples; medxfer_nb {medxfer_nb.__version__}, "
                f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}\n")
        table = csv.DictWriter(f, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__": main()
