"The cache of frozen features: oracles, keys that must differ, two processes, a bad and a full disk, and memory that does not grow."
import copy
import errno
import math
import multiprocessing
import os
import shutil
import subprocess
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from medxfer_nb import features as module
from medxfer_nb.backbones import extract
from medxfer_nb.concepts import SmallCNN
from medxfer_nb.core import MedxferError
from medxfer_nb.features import PRECISIONS, clear, content, features, fingerprint
from medxfer_nb.imageset import ImageSet, Info, Task
from medxfer_nb.surgery import Network, Spec, cut

SPAWN = multiprocessing.get_context("forkserver")  # torch is imported once, in the server
SPAWN.set_forkserver_preload(["medxfer_nb.features", __name__])


def small(classes=2, seed=0):
    "A small network with random weights, whose head reads 128 numbers."
    model = nn.Sequential(OrderedDict(SmallCNN(classes, (16, 32, 64, 128), seed).named_children()))
    return Network(*cut(model, 32), Spec("small", size=32)).eval()


def pictures(n, side=40, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, side, side), dtype=np.uint8)


def entries(cache): return sorted(p for p in (cache / "features").glob("*/"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDXFER_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def passed(monkeypatch):
    "The number of pictures in each batch that was computed."
    sizes, before = [], module._activations
    def counting(net, x, names, pooled):
        sizes.append(len(x))
        return before(net, x, names, pooled)
    monkeypatch.setattr(module, "_activations", counting)
    return sizes


# --- what comes back ---


def test_vectors_are_those_of_extract(cache):
    net, x = small(), pictures(150)
    layers = [None, *net.stage_names, *dict(net.neck.named_children())]
    for stage in layers: assert torch.equal(features(net, x, stage), extract(net, x, stage))
    several, expected = (f(net, x, layers[:0:-1]) for f in (features, extract))
    assert list(several) == layers[:0:-1] and all(torch.equal(several[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stage", [None, "stem", "stage2"])
def test_maps_are_those_of_the_network(cache, stage):
    net, x = small(), pictures(70)
    maps = features(net, x, stage, pooled=False)
    with torch.inference_mode(): expected = torch.cat([net.feature_map(b, stage) for b in net.batches(x)])
    assert maps.shape == expected.shape and torch.equal(maps, expected)


def test_an_image_set_is_its_pictures(cache, passed):
    x = pictures(6)
    table = pd.DataFrame(dict(id=range(6), group=range(6), split="train", sick=[0, 1] * 3))
    ds = ImageSet(x, table, {"sick": Task("sick", "binary", ("no", "yes"))}, Info("tiny", "noise", "none", "CC0", "here"))
    assert torch.equal(features(small(), ds), features(small(), x)) and passed == [6]


def test_colour_is_not_grey(cache):
    x = np.repeat(pictures(4)[..., None], 3, axis=-1)
    x[..., 0] //= 2
    assert torch.equal(features(small(), x), extract(small(), x)) and not torch.equal(features(small(), x), features(small(), x[..., 1]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_is_rounding(cache, precision):
    net, x = small(), pictures(20)
    for _ in range(2): kept = features(net, x, precision=precision)  # written, then read back
    assert kept.dtype == PRECISIONS[precision][0] and torch.equal(kept, extract(net, x).to(kept.dtype))


def test_float16_refuses_what_it_cannot_hold(cache):
    net = small()
    with torch.no_grad(): next(m for m in reversed([*net.stages.modules()]) if isinstance(m, nn.BatchNorm2d)).weight.mul_(1e7)
    with pytest.raises(MedxferError, match="float16.*65504.*bfloat16"): features(net, pictures(4), precision="float16")
    assert entries(cache) == [] and features(net, pictures(4), precision="bfloat16").isfinite().all()


def test_changes_stay_in_memory(cache, passed):
    net, x = small(), pictures(5)
    first = features(net, x)
    right = first.clone()
    first.zero_()
    module._verified.clear()
    assert torch.equal(features(net, x), right) and len(passed) == 1


def test_memory_mapped_pictures_stay_what_they_are(cache, tmp_path):
    x = pictures(30)
    np.save(tmp_path / "x.npy", x)
    for mode in ("r", "r+", "c"):
        mapped = np.load(tmp_path / "x.npy", mmap_mode=mode)
        if mode != "r": mapped[3] = 7
        expected = np.array(mapped)
        assert content(mapped) == content(expected) and content(mapped[5:]) == content(expected[5:])
        features(small(), mapped[1:])
        assert np.array_equal(mapped, expected)  # a private change is not dropped with the pages
    assert (np.load(tmp_path / "x.npy")[3] == 7).all()


# --- keys ---


def parts(net): return [*net.stages, net.neck, net.head]


def tensors(part): return [*part.parameters(), *part.buffers()]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bit_of_the_frozen_part_counts_and_no_other(data):
    net, stages = small(), small().stage_names
    boundary = data.draw(st.sampled_from([*stages, None, "head"]))
    inside = (stages.index(boundary) + 1) if boundary in stages else len(stages) + 1 if boundary is None else len(stages) + 2
    where = data.draw(st.sampled_from([i for i, part in enumerate(parts(net)) if tensors(part)]))
    tensor = data.draw(st.sampled_from(tensors(parts(net)[where])))
    before = fingerprint(net, boundary)
    raw = tensor.data.contiguous().flatten().view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    tensor.data = raw.view(tensor.dtype).view(tensor.shape)
    assert (fingerprint(net, boundary) != before) == (where < inside)


SPECS = dict(size=48, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), name="other")


@pytest.mark.parametrize("change", SPECS)
def test_preprocessing_counts(change):
    net = small()
    net.spec = replace(net.spec, **{change: SPECS[change]})
    assert fingerprint(net, "stem") != fingerprint(small(), "stem")


def test_where_the_weights_came_from_does_not_count():
    net = small()
    net.spec = replace(net.spec, weights="a file")
    assert fingerprint(net) == fingerprint(small())


def test_heads_and_memory_formats_and_modes_share():
    net = small(7).to(memory_format=torch.channels_last).train()
    for p in net.stages.parameters(): p.requires_grad_(False)
    assert fingerprint(net) == fingerprint(small(2)) and fingerprint(net, "head") != fingerprint(small(2), "head")


def test_layers_without_weights_count():
    net = small()
    stride = next(m for m in net.stages.modules() if isinstance(m, nn.Conv2d))
    before, stride.stride = fingerprint(net), (2, 2)
    assert fingerprint(net) != before
    prints = set()
    for step in (lambda x: x + 1, lambda x: x * 2):
        net.neck = nn.Sequential(fx.symbolic_trace(_Step(step)), *small().neck)
        prints.add(fingerprint(net))
    assert len(prints) == 2


class _Step(nn.Module):
    def __init__(self, step): super().__init__(); self.step = step

    def forward(self, x): return self.step(x)


def test_hidden_buffers_count():
    net, other = small(), small()
    for n, value in ((net, 1.0), (other, 2.0)): n.stages[0].register_buffer("table", torch.tensor(value), persistent=False)
    assert net.state_dict().keys() == small().state_dict().keys() and fingerprint(net) != fingerprint(other)


def write_print(path): path.write_text(fingerprint(small()))


def test_fingerprint_is_the_same_in_another_process(tmp_path):
    start(write_print, tmp_path / "print").join()  # with other addresses, and another seed of hash()
    assert (tmp_path / "print").read_text() == fingerprint(small())


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 5), side=st.integers(1, 6), data=st.data())
def test_content_is_shape_type_and_bytes(n, side, data):
    x = np.random.default_rng(n).integers(0, 256, (n, side, side), dtype=np.uint8)
    y = x.copy()
    y.reshape(-1)[data.draw(st.integers(0, y.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert content(x) == content(x.copy()) == content(np.asfortranarray(x)) != content(y)
    assert len({content(x), content(x.reshape(n, -1)), content(x.view(np.int8))}) == 3


def test_blocks_do_not_change_the_content():
    x = pictures(3, 4000)  # 48 MB, one picture a block
    assert content(x) == content(x[::-1][::-1]) and content(x) != content(x[::-1])


def test_each_setting_is_an_entry_of_its_own(cache, passed):
    net, x = small(), pictures(9)
    calls = [dict(), dict(stage="stem"), dict(stage="stage3"), dict(stage="stage3", pooled=False), dict(precision="float16"),
             dict(stage=["stem", "stage3"]),
             dict(view=wobble, views=2), dict(view=wobble, views=3), dict(view=wobble, views=2, seed=1), dict(view=partial(wobble, by=0.2), views=2),
             dict(view=wobble, views=2, batch_size=4), dict(view=Policy(0.1), views=2), dict(view=Policy(0.3), views=2)]
    for k, options in enumerate(calls, 1):
        for _ in range(2): features(net, x, **options)
        assert len(entries(cache)) == k, options
    assert sum(passed) == 9 * (6 + 15)  # six calls without views, fifteen views
    features(net, x, ["stage3", "stem"]), features(net, x, batch_size=4), features(net, x, seed=5)
    assert len(entries(cache)) == len(calls)  # neither the order of names nor, without views, batch size and seed


# --- views ---


def wobble(x, generator, by=0.1): return x + by * torch.randn(x.shape, generator=generator)


@dataclass
class Policy:
    by: float

    def __call__(self, x, generator): return wobble(x, generator, self.by)


def nested():
    def view(x, generator): return x
    return view


def half(x, generator): return x[::2]


def test_views_are_what_a_loop_makes(cache):
    net, x = small(), pictures(70)
    views = features(net, x, view=wobble, views=3, seed=4)
    for v in range(3):
        chance = torch.Generator().manual_seed(int(np.random.SeedSequence([4, v]).generate_state(1)[0]))
        with torch.inference_mode(): expected = torch.cat([net.embed(wobble(b, chance)) for b in net.batches(x)])
        assert torch.equal(views[v], expected)
    assert torch.equal(features(net, x, view=wobble, views=2, seed=4), views[:2])
    assert not torch.equal(views[0], views[1]) and not torch.equal(features(net, x, view=wobble, views=1)[0], views[0])


def test_views_of_maps(cache):
    net, x = small(), pictures(6)
    plain = features(net, x, "stage1", pooled=False)
    assert features(net, x, "stage1", pooled=False, view=wobble, views=2).shape == (2, *plain.shape)
    still = features(net, x, "stage1", pooled=False, view=partial(wobble, by=0), views=2)
    assert torch.equal(still, torch.stack([plain, plain]))


REFUSED = [lambda x, generator: x, nested(), partial(wobble, by=torch.tensor(1.0)), partial(nested()), torch.relu, nn.Identity(), Policy(by=nested())]


@pytest.mark.parametrize("view", REFUSED, ids=["lambda", "nested", "tensor", "partial", "builtin", "object", "field"])
def test_a_view_without_a_stable_name_is_refused(cache, view):
    with pytest.raises(MedxferError, match="no stable name.*functools.partial"): features(small(), pictures(2), view=view, views=2)
    assert entries(cache) == []


def test_an_edited_view_is_another_view(cache, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    for k, body in enumerate(("x + 1", "x + 2", "x + 1")):
        (tmp_path / f"home{k}.py").write_text(f"def view(x, generator): return {body}\n")
        view = __import__(f"home{k}").view
        view.__module__ = "home"
        seen.append(module._recipe(view))
    assert seen[0] == seen[2] != seen[1]


BAD = {
    "float pictures": (dict(pictures=np.zeros((2, 8, 8))), "float64.*uint8"),
    "no picture": (dict(pictures=np.zeros((0, 8, 8), np.uint8)), "at least one"),
    "stage": (dict(stage="stage7"), "unknown stage.*did you mean"), "neck as map": (dict(stage="pool", pooled=False), "unknown stage"),
    "no stage": (dict(stage=[]), "names no layer"), "precision": (dict(precision="float8"), "precision 'float8'"),
    "views alone": (dict(views=2), "or neither"), "view alone": (dict(view=wobble), "or neither"),
    "fewer than none": (dict(view=wobble, views=-1), "or neither"),
    "shape": (dict(view=half, views=1), r"\(1, 3, 32, 32\) of a batch \(2, 3, 32, 32\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_to_do(cache, case):
    options, message = BAD[case]
    with pytest.raises(MedxferError, match=message): features(small(), **dict(dict(pictures=pictures(2)), **options))
    assert not list((cache / "features").rglob("*.npy"))


# --- a bad disk, a killed writer, two at once ---


def damage(file, how):
    raw = bytearray(file.read_bytes())
    if how == "gone": file.unlink()
    elif how == "short": file.write_bytes(raw[:-5])
    elif how == "empty": file.write_bytes(b"")
    else:
        raw[200] ^= 4
        file.write_bytes(raw)


@pytest.mark.parametrize("how", ["gone", "short", "empty", "bit"])
@pytest.mark.parametrize("name", ["vectors.npy", "manifest.json"])
def test_damage_is_mended(cache, passed, capsys, name, how):
    net, x = small(), pictures(10)
    right = features(net, x).clone()
    (folder,) = entries(cache)
    if name == "manifest.json": module._verified.clear()  # as in a new process
    if name == "manifest.json" and how == "bit": (folder / name).write_text("{}")
    else: damage(folder / name, how)
    assert torch.equal(features(net, x), right) and passed == [10, 10] and "building it again" in capsys.readouterr().out
    module._verified.clear()
    assert torch.equal(features(net, x), right) and passed == [10, 10]


def test_checked_once_a_process(cache, monkeypatch):
    net, x, checks, before = small(), pictures(4), [], module.cached
    monkeypatch.setattr(module, "cached", lambda *args: checks.append(1) or before(*args))
    for _ in range(5): features(net, x)
    assert len(checks) == 1
    (folder,) = entries(cache)
    os.utime(folder / "vectors.npy", (0, 0))
    for _ in range(3): features(net, x)
    assert len(checks) == 2


def slow(x, generator):
    time.sleep(0.2)
    return x


def write_slowly(n): features(small(), pictures(n), view=slow, views=50, batch_size=1)


def write_once(n, log):
    before = module._activations
    def counting(net, x, names, pooled):
        with open(log, "a") as f: f.write(f"{len(x)}\n")
        time.sleep(0.05)
        return before(net, x, names, pooled)
    module._activations = counting
    assert torch.equal(features(small(), pictures(n), batch_size=4), extract(small(), pictures(n), batch_size=4))


def start(target, *args):
    "Run `target` in a process of its own; the server that forks it does not know today's MEDXFER_CACHE."
    process = SPAWN.Process(target=_there, args=(os.environ.get("MEDXFER_CACHE"), target, args))
    process.start()
    return process


def _there(cache, target, args):
    if cache: os.environ["MEDXFER_CACHE"] = cache
    target(*args)


def wait_for(what, seconds=60):
    "Wait until `what()` is true."
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def test_half_file_of_a_killed_writer_is_not_taken_for_whole_and_goes(cache):
    process = start(write_slowly, 2)
    (half_folder,) = wait_for(lambda: [p.parent for p in cache.glob("features/.*/vectors.npy")])
    features(small(), pictures(3))  # another entry: the writer lives, so its half stays
    assert half_folder.exists() and clear(math.inf) == 0 and clear() > 0 and half_folder.exists()
    process.kill()
    process.join()
    assert half_folder.exists()
    features(small(), pictures(4))
    assert not half_folder.exists() and len(entries(cache)) == 1


def test_processes_that_want_the_same_compute_it_once(cache):
    processes = [start(write_once, 16, cache / "log") for _ in range(3)]
    for p in processes: p.join()
    assert [p.exitcode for p in processes] == [0] * 3 and (cache / "log").read_text().split() == ["4"] * 4


def test_clear_by_age(cache):
    net = small()
    for n in (2, 3): features(net, pictures(n))
    old = next(f for f in entries(cache) if len(np.load(f / "vectors.npy")) == 2)
    os.utime(old / "manifest.json", (0, time.time() - 10 * 86400))
    size = sum(f.stat().st_size for f in old.iterdir())
    assert clear(days=20) == 0 and clear(days=5) == size and not old.exists() and len(entries(cache)) == 1
    features(net, pictures(2))
    assert clear() > size and entries(cache) == []


def test_use_makes_an_entry_young_again(cache):
    net, x = small(), pictures(2)
    for _ in range(2):
        features(net, x)
        os.utime(entries(cache)[0] / "manifest.json", (0, time.time() - 10 * 86400))
    features(net, x)
    assert clear(days=5) == 0


def test_room_is_asked_for_after_the_first_batch(cache, passed, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000 * 128 * 4 - 1))
    with pytest.raises(MedxferError, match=r"0.000512 GB.*GB free; features.clear\(\)"): features(small(), pictures(1000))
    assert passed == [63] and not list((cache / "features").rglob("*.npy"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000 * 128 * 4))
    assert len(features(small(), pictures(1000))) == 1000


def test_disk_that_fills_up_on_the_way(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if made.returncode: pytest.skip(f"cannot mount a small disk: {made.stderr.strip()}")
    try:
        monkeypatch.setenv("MEDXFER_CACHE", str(disk))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
        with pytest.raises(MedxferError, match="the disk is full.*MEDXFER_CACHE"): features(small(), pictures(100), "stem", pooled=False)
        assert not list((disk / "features").rglob("*.npy")) and entries(disk) == []
        assert len(features(small(), pictures(10))) == 10
    finally: subprocess.run(["umount", "-l", disk], check=True)


def test_an_error_of_the_disk_is_clear_and_leaves_nothing(cache, monkeypatch):
    def full(x, precision): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module, "_bytes", full)
    with pytest.raises(MedxferError, match="the disk is full.*MEDXFER_CACHE"): features(small(), pictures(3))
    assert not list((cache / "features").rglob("*.npy"))


# --- memory ---

def peak(file, how, answer):
    "Keep the maps of memory-mapped pictures; write down the MB at the peak, and those of what was read and written."
    net, x = small(), np.load(file, mmap_mode="r")
    if how == "features": maps = features(net, x, "stem", pooled=False, batch_size=32)
    else:
        with torch.inference_mode(): maps = torch.cat([net.feature_map(b, "stem") for b in net.batches(x, 32)])
    top = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    answer.write_text(f"{int(top) / 1e3} {(x.nbytes + maps.nbytes) / 1e6}")


def measure(folder, n, how):
    x = np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.uint8, shape=(n, 160, 160))
    x[:] = np.arange(n)[:, None, None] % 251
    del x
    process = start(peak, folder / "x.npy", how, folder / "answer")
    process.join()
    assert process.exitcode == 0
    return map(float, (folder / "answer").read_text().split())


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak memory of one process is read from Linux's /proc")
def test_memory_does_not_grow_with_the_pictures(cache):
    (few, few_moved), (many, many_moved) = measure(cache, 300, "features"), measure(cache, 5500, "features")
    naive, _ = measure(cache, 5500, "naive")
    assert many_moved - few_moved > 200 and many - few < 20  # pictures and maps grew by 200 MB, memory did not
    assert naive - few > 200  # otherwise nothing was measured


def test_copies_of_a_network_share(cache, passed):
    net, x = small(), pictures(5)
    features(net, x)
    features(copy.deepcopy(net).reset_classifier(9), x)
    assert passed == [5]
