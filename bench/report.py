"The tables of bench/README.md, computed from bench/results.json: `python bench/report.py` writes them anew."
import json
import math
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
MARKS = "<!-- results -->", "<!-- end of results -->"


def markdown(rows):
    "A list of dicts as a table."
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in line) + " |" for line in lines)


def times(epoch, player, once=False, key="min"):
    "How many times as long the other's epoch takes; with `once`, our one-time cost is spread over the epochs of the strategy's phase."
    ours = epoch["players"]["ours"]
    return epoch["players"][player][key] / (ours[key if key != "usual" else "min"] + once * ours["once"] / ours["phase"])


def partial_bound(results, first):
    "How much faster an epoch of `partial` can get at most, counting operations, if nothing is saved but the pass through frozen stages."
    share = results["ceiling"][str(first["threads"])]["steps"][first["network"]]["partial"]  # of the operations forward; backward costs twice as many
    return (1 + 2 * share) / (3 * share)


def targets(results):
    "What was wanted, and what was measured in the first case: EfficientNet-Lite0, two threads, BatchNorm still on both sides, fastai at its best."
    first = {key: results["epochs"][0][key] for key in ("network", "threads", "bn")}
    found, rows = {e["workload"]: e for e in results["epochs"] if first.items() <= e.items()}, []
    for kind, wanted in dict(frozen=100, partial=3, full=1.3).items():
        got, spread, phase = times(found[kind], "fastai"), times(found[kind], "fastai", once=True), found[kind]["players"]["ours"]["phase"]
        note = f"{times(found[kind], 'fastai', key='usual'):.3g}x against its usual way; {spread:.3g}x with the one-time cost over {phase} epochs"
        if kind == "partial": note += f"; {partial_bound(results, first):.2g}x is the most that skipping the frozen stages can give, by operations"
        rows.append(dict(what=f"{kind} epoch against fastai's", wanted=f"{wanted}x", measured=f"{got:.3g}x", note=note, reached=got >= wanted))
    p, s = results["probes"], results["study"]
    study = f"{len(s['scores'])} arms, {s['seeds']} seeds, {s['size']} px, {len(s['failed'])} runs failed"
    probes = f"scikit-learn {p['sklearn']:.3g} s; features before {p['features']:.3g} s; same penalty in {100 * p['same_penalty']:.0f} %"
    limits = [(f"{p['draws']} probes x {p['penalties']} penalties", 5, p["seconds"], probes), ("label study", 480, s["wall"], study),
              ("full fine-tuning in it", 360, s["seconds"]["fine_tuning"], "training only")]
    for what, most, seconds, note in limits:
        rows.append(dict(what=what, wanted=f"{most} s", measured=f"{seconds:.3g} s", note=note, reached=seconds <= most))
    return [row | dict(reached="yes" if row["reached"] else "no") for row in rows]


def epochs(results):
    "Milliseconds of our epoch, and how many times as long the others take."
    return [dict(network=e["network"], threads=e["threads"], BatchNorm=e["bn"], trains=e["workload"], **{
        "ours in": e["players"]["ours"]["precision"], "least, ms": e["players"]["ours"]["min"] * 1e3, "median": e["players"]["ours"]["median"] * 1e3,
        "once, s": e["players"]["ours"]["once"],
        "fastai, usual": times(e, "fastai", key="usual"), "fastai, best": times(e, "fastai"), "of medians": times(e, "fastai", key="median"),
        "with once": times(e, "fastai", once=True), "torchvision, best": times(e, "torchvision")}) for e in results["epochs"]]


def ceilings(results):
    "The machine's rates, and which share of them a step of full fine-tuning reaches."
    rows, steps = [], math.ceil(results["data"]["train"] / results["batch"])
    for e in (e for e in results["epochs"] if e["workload"] == "full"):
        most = results["ceiling"][str(e["threads"])]
        need, players = most["steps"][e["network"]], e["players"]
        shares = {f"{p}, % of {rate}": 100 * need[unit] * steps / players[p]["min"] / most[rate]
                  for rate, unit in (("float32", "gflop"), ("bfloat16", "gflop"), ("copy", "gb")) for p in ("ours", "fastai")}
        rows.append(dict(network=e["network"], threads=e["threads"], BatchNorm=e["bn"], **{"float32, GFLOP/s": most["float32"],
                         "bfloat16, GFLOP/s": most["bfloat16"], "copy, GB/s": most["copy"], "GFLOP a step": need["gflop"]}, **shares))
    return rows


def scores(results):
    "A row a strategy, a column a budget."
    grid = pd.DataFrame(results["study"]["scores"]).pivot(index="strategy", columns="labels", values="score")
    return [{"strategy": name, "seconds": results["study"]["seconds"][name], **row} for name, row in grid.iterrows()]


def tables(results):
    "All of it."
    facts, data = results["machine"], results["data"]
    head = (f"{results['date']}, {facts['cpu']}, {facts['cores']} cores, {facts['system']}; {data['name']}, {data['train']} training pictures, "
            f"{results['size']} px, batches of {results['batch']}; " + ", ".join(f"{k} {v}" for k, v in results["versions"].items()) + ".")
    parts = {"Targets": targets, "Epochs": epochs, "Ceiling": ceilings, f"Label study: {results['study']['metric']} on the test pictures": scores}
    return "\n\n".join([head, *(f"### {title}\n\n{markdown(make(results))}" for title, make in parts.items())])


def write(results):
    "Put the tables into the README, in the place of the old ones."
    page = (HERE / "README.md").read_text()
    before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
    (HERE / "README.md").write_text(f"{before}{MARKS[0]}\n{tables(results)}\n{MARKS[1]}{after}")


if __name__ == "__main__": write(json.loads((HERE / "results.json").read_text()))
