"Each exercise as solved, untouched and wrong; the student's copy; submissions that were tampered with."
from pathlib import Path

import nbformat
import pytest

from medxfer_nb.classroom import grade, grade_folder, student_copy, tasks
from medxfer_nb.core import MedxferError

EXERCISES = sorted((Path(__file__).parents[1] / "nbs" / "exercises").glob("*.ipynb"))
each = pytest.mark.parametrize("path", EXERCISES, ids=lambda p: p.stem)

CONVOLVE = """def convolve(image, kernel):
    (H, W), (h, w) = image.shape, kernel.shape
    """
SIZE, POOL, SWAP = "def size(n, k, stride=1, padding=0): ", "def pool(image, side=2):\n    ", "def swap_head(net, classes):\n    "
FREEZE, COUNT = "def freeze(net):\n    ", "return sum(p.numel() for p in net.parameters() if p.requires_grad)"
TRAIN = """def train_head(net, x, y, steps=150, lr=0.3):
    {mode}
    optimiser = torch.optim.{optimiser}([p for p in net.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        {clear}
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()"""
GOOD = {"mode": "net.train(); net.stages.eval()", "optimiser": "SGD", "clear": "optimiser.zero_grad()"}
ACCURACY = "def accuracy(net, x, y):\n    "
SPLIT = "def split(patients, share=0.25, seed=0):\n    rng, n = np.random.default_rng(seed), len(patients)\n    "
INTERVAL = """def interval(correct, patients, repeats=2000, seed=0):
    rng, n = np.random.default_rng(seed), len(correct)
    _, number = np.unique(patients, return_inverse=True)
    right, images = np.bincount(number, correct), np.bincount(number)
    drawn = rng.integers(0, len(images), (repeats, len(images)))
    """
DIFFERENCE = "def difference(a, b, patients, repeats=2000, seed=0):\n    d = a.astype(float) - b\n    "
VERDICT = '"a is better" if low > 0 else "b is better" if high < 0 else "no evidence"'

# exercise -> (solution cell, what a student might write)
WRONG = {
    "01_convolution": [
        ("convolve", CONVOLVE + "return np.array([[(image[i:i+h, j:j+w] * kernel[::-1, ::-1]).sum() for j in range(W-w+1)] for i in range(H-h+1)])"),
        ("convolve", CONVOLVE + "return np.array([[(image[i:i+h, j:j+h] * kernel).sum() for j in range(W-h+1)] for i in range(H-h+1)])"),
        ("convolve", CONVOLVE + "return np.array([[(image[i:i+h, j:j+w] * kernel).sum() for j in range(W-w)] for i in range(H-h)])"),
        ("convolve", CONVOLVE + "return np.array([[(image[i:i+h, j:j+w] * kernel).mean() for j in range(W-w+1)] for i in range(H-h+1)])"),
        ("size", SIZE + "return -(-(n + 2 * padding - k) // stride) + 1"),
        ("size", SIZE + "return (n + padding - k) // stride + 1"),
        ("size", SIZE + "return n + 2 * padding - k + 1"),
        ("size", SIZE + "return (n + 2 * padding - k) / stride + 1"),
        ("pool", POOL + "h, w = image.shape[0] // side, image.shape[1] // side\n    out = np.zeros((h, w))\n    for i in range(h * side):\n"
                        "        for j in range(w * side): out[i // side, j // side] = max(out[i // side, j // side], image[i, j])\n    return out"),
        ("pool", POOL + "h, w = image.shape[0] // side, image.shape[1] // side\n"
                        "    return image[:h*side, :w*side].reshape(h, side, w, side).mean((1, 3))"),
        ("pool", POOL + "return image[::side, ::side]"),
        ("pool", POOL + "h, w = image.shape[0] // 2, image.shape[1] // 2\n    return image[:h*2, :w*2].reshape(h, 2, w, 2).max((1, 3))")],
    "02_head_swap_and_freeze": [
        ("swap", SWAP + "net.head = nn.Linear(32, classes)\n    return net"),
        ("swap", SWAP + "net.head = nn.Linear(net.head.in_features, classes)"),
        ("swap", SWAP + "return SmallCNN(classes, channels=(8, 16, 32))"),
        ("swap", SWAP + "if net.head.out_features != classes: net.head = nn.Linear(net.head.in_features, classes)\n    return net"),
        ("freeze", FREEZE + "net.requires_grad_(False)\n    return net.head.weight.numel() + net.head.bias.numel()"),
        ("freeze", FREEZE + "net.stages.requires_grad_(False)\n    return sum(p.requires_grad for p in net.parameters())"),
        ("freeze", FREEZE + "net.stages[0].requires_grad_(False)\n    return net.head.weight.numel() + net.head.bias.numel()"),
        ("freeze", FREEZE + "net.stages.requires_grad_(False)\n    return 330"),
        ("freeze", FREEZE + "net.stages.requires_grad_(False); net.head.bias.requires_grad_(False)\n    " + COUNT),
        ("train", TRAIN.format(**GOOD | {"clear": "pass"})),
        ("train", TRAIN.format(**GOOD | {"mode": "net.train()"})),
        ("train", TRAIN.format(**GOOD | {"mode": "net.train(); net.stages.eval(); net.requires_grad_(True)"})),
        ("train", TRAIN.format(**GOOD | {"optimiser": "Adam"})),
        ("train", TRAIN.format(**GOOD).replace("range(steps)", "range(1)")),
        ("accuracy", ACCURACY + "return (net(x).argmax(1) == y).float().mean().item()"),
        ("accuracy", ACCURACY + "net.train()\n    with torch.no_grad(): return (net(x).argmax(1) == y).float().mean().item()"),
        ("accuracy", ACCURACY + "net.eval()\n    with torch.no_grad(): return (net(x).argmax(1) == y).float().mean()"),
        ("accuracy", ACCURACY + "net.eval()\n    with torch.no_grad(): return (net(x).argmax(1) == y).sum().item()")],
    "03_interval_by_patient": [
        ("split", SPLIT + "order = rng.permutation(n)\n    return order[int(share * n):], order[:int(share * n)]"),
        ("split", SPLIT + "return next(GroupShuffleSplit(1, test_size=share).split(patients, groups=patients))"),
        ("split", SPLIT + "return next(GroupShuffleSplit(1, test_size=share, random_state=0).split(patients, groups=patients))"),
        ("split", SPLIT + "return next(GroupShuffleSplit(1, test_size=share, random_state=seed).split(patients, groups=patients))[::-1]"),
        ("interval", INTERVAL + "return tuple(np.percentile(correct[rng.integers(0, n, (repeats, n))].mean(1), [2.5, 97.5]))"),
        ("interval", INTERVAL + "return tuple(np.percentile(right[drawn].sum(1) / images[drawn].sum(1), [5, 95]))"),
        ("interval", INTERVAL + "return tuple(np.percentile((right / images)[drawn].mean(1), [2.5, 97.5]))"),
        ("interval", INTERVAL + "half = 1.96 * correct.std() / n ** 0.5\n    return correct.mean() - half, correct.mean() + half"),
        ("interval", INTERVAL + "drawn = drawn[:, :20]\n    return tuple(np.percentile(right[drawn].sum(1) / images[drawn].sum(1), [2.5, 97.5]))"),
        ("difference", DIFFERENCE + "(p, q), (r, s) = interval(a, patients), interval(b, patients)\n    low, high = p - s, q - r\n    "
                                    "return low, high, " + VERDICT),
        ("difference", DIFFERENCE + "low, high = interval(d, patients)\n    return low, high, 'a is better' if d.mean() > 0 else 'b is better'"),
        ("difference", DIFFERENCE + "low, high = interval(d, patients)\n    return low, high, 'a is better' if low > 0 else 'no evidence'"),
        ("difference", DIFFERENCE + "low, high = interval(-d, patients)\n    return low, high, " + VERDICT)],
}


def put(nb, name, source):
    "The notebook with the solution cell `name` replaced."
    nb = nbformat.from_dict(nb)
    next(c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade_id") == name).source = source
    return nb


@each
def test_solved_has_full_marks_and_untouched_has_none(path):
    solved, untouched = grade(path), grade(student_copy(path), path)
    assert solved.points == tasks(path) and not solved.messages
    assert untouched.total == 0 and set(untouched.messages) == set(tasks(path)) and "NotImplementedError" in str(untouched)


@pytest.fixture(autouse=True)
def no_virtual_environment_on_the_path(monkeypatch):
    "As for who calls .venv/bin/jupyter or make without activating .venv."
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def test_a_mistake_costs_its_own_task_only():
    path = EXERCISES[-1]
    name, source = WRONG[path.stem][4]
    result = grade(put(nbformat.read(path, 4), name, source), path)
    assert result.points["split-test"] == 1 and result.points["interval-test"] == 0 and "as if the images were independent" in str(result)


@each
def test_every_wrong_solution_is_caught(path):
    cells = {c.metadata.get("nbgrader", {}).get("grade_id"): c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"}
    solved = {}
    for source in cells.values(): exec(source, solved)
    passed = []
    for name, wrong in WRONG[path.stem]:
        room = dict(solved)
        exec(wrong, room)
        try: exec(cells[f"{name}-test"], room)
        except Exception: continue
        passed.append(wrong)
    assert passed == []
    assert {f"{name}-test" for name, _ in WRONG[path.stem]} == set(tasks(path))       # no task without a wrong solution


def secrets(nb):
    "The lines between nbgrader's marks that stand nowhere else in the notebook."
    hidden, public, inside = set(), set(), False
    for line in "\n".join(c.source for c in nb.cells).splitlines():
        inside = (inside or "### BEGIN" in line) and "### END" not in line
        (hidden if inside else public).add(line.strip())
    return hidden - public


@each
def test_the_copy_holds_no_solution_and_no_hidden_test(path):
    nb, lines = student_copy(path), secrets(nbformat.read(path, 4))
    nbformat.validate(nb)
    text = "\n".join(c.source for c in nb.cells)
    assert len(lines) > 20 and not lines & {line.strip() for line in text.splitlines()}
    assert "SOLUTION" not in text and "HIDDEN" not in text and text.count("YOUR CODE HERE") == len(tasks(path))
    assert not any(c.get("outputs") for c in nb.cells)
    assert all(not c.metadata.editable for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade"))


def test_changed_deleted_and_forged_tests_do_not_help():
    path = EXERCISES[-1]
    nb = student_copy(path)
    graded = [c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade")]
    graded[0].source, graded[1].metadata.nbgrader = "pass", {"grade_id": graded[1].metadata.nbgrader.grade_id, "grade": True, "points": 100}
    nb.cells.remove(graded[2])
    forged = nbformat.v4.new_code_cell("pass", metadata={"nbgrader": dict(graded[0].metadata.nbgrader, grade_id="extra", points=50)})
    result = grade(nbformat.from_dict({**nb, "cells": [*nb.cells, forged]}), path)
    assert result.total == 0 and result.max == tasks(path) and set(result.points) == set(tasks(path))


def test_what_cannot_be_graded_is_named(tmp_path):
    with pytest.raises(MedxferError, match="no notebook"): student_copy(tmp_path / "gone.ipynb")
    (tmp_path / "a.ipynb").write_text("{}")
    with pytest.raises(MedxferError, match=r"a\.ipynb"): grade(tmp_path / "a.ipynb")
    with pytest.raises(MedxferError, match="no graded cell"): student_copy(nbformat.v4.new_notebook())
    with pytest.raises(MedxferError, match="no notebook"): grade_folder(tmp_path / "empty", EXERCISES[0])
