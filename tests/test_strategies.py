"Strategies: what each of them may touch, where it starts, and what it learns without labels."
import copy
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_imageset import random_set
from test_training import bright_or_dark
from test_transfer import fingerprint, source
from torch import nn
from torch.nn import functional as F

from medxfer_nb.backbones import create_model
from medxfer_nb.core import MedxferError
from medxfer_nb.loop import Callback
from medxfer_nb.penalties import BSS, L2SP, trunk
from medxfer_nb.strategies import _MOVES, ALL, HEAD, KNOWN, _nt_xent, contrast, mean_var, pseudo_labels
from medxfer_nb.training import predict_proba
from medxfer_nb.transfer import STRATEGIES, Phase, Strategy, build_target, copy_weights, freeze, transfer


def quick(name):
    s = KNOWN[name]
    s = replace(s, prepare=partial(contrast, epochs=1)) if s.prepare is contrast else s
    return replace(s, phases=tuple(replace(p, epochs=1) for p in s.phases))


def target(net_a): return build_target(net_a, copy_weights(net_a), 2)


# --- every one of them ---


@pytest.mark.parametrize("name", [n for n in KNOWN if n != "fc6"])
def test_every_strategy_runs_again_alike_and_leaves_the_source(name):
    ds, net_a = random_set(), source()
    before = fingerprint(net_a)
    runs = [transfer(ds, quick(name), n=20, net_a=net_a, seed=seed) for seed in (1, 1)]
    assert fingerprint(net_a) == before and runs[0].config["strategy"] == name
    assert fingerprint(runs[0].net) == fingerprint(runs[1].net) and runs[0].history.equals(runs[1].history)
    assert list(runs[0].net.state_dict()) == list(build_target(runs[0].net, runs[0].net.state_dict(), 2).state_dict())
    assert ds.openings["val"] == ds.openings["test"] == 0


@pytest.mark.parametrize("name", ["l2_sp", "delta", "bss", "lwf", "co_tuning"])
def test_penalty_is_logged_and_part_of_the_loss(name):
    s = quick(name)
    run = transfer(random_set(), s, n=20, net_a=source())
    column = run.history[s.phases[1].callbacks[0].__name__]
    assert np.isnan(column.iloc[0]) and 0 <= column.iloc[1] <= run.history["loss"].iloc[1]


def test_names_are_known_right_after_the_import():
    code = "import medxfer_nb.transfer, medxfer_nb as mx\ntry: mx.transfer(None, 'l2sp')\nexcept mx.MedxferError as e: assert 'l2_sp' in str(e), e"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_unique_and_the_first_four_stay():
    assert all(name == s.name for name, s in KNOWN.items()) and len({s.title for s in KNOWN.values()}) == len(KNOWN)
    assert list(STRATEGIES) == ["scratch", "feature_extraction", "fully_connected", "fine_tuning"] and STRATEGIES.items() <= KNOWN.items()


# --- what moves ---


def free(net, s): return [[any(p.requires_grad for p in part.parameters()) for part in freeze(net, p.frozen).stages] for p in s.phases]


@pytest.mark.parametrize("backbone, stages", [("small_cnn", 4), ("alexnet", 3), ("tf_efficientnet_lite0", 5)])
def test_gradual_unfreezing_frees_one_more_stage_a_phase(backbone, stages):
    rows = free(create_model(backbone, pretrained=False, num_classes=2, size=64), KNOWN["gradual"])
    assert [sum(row) for row in rows] == [min(i, stages) for i in range(6)]
    assert all(row == sorted(row) for row in rows)


def test_early_and_last_train_what_they_say():
    assert [free(source(), KNOWN[name])[1] for name in ("early", "last_two")] == [[True, True, False, False], [False, False, True, True]]


@pytest.mark.parametrize("name, moved", [("early", [True, True, False, False]), ("last_two", [False, False, True, True])])
def test_frozen_stages_stay_bit_for_bit(name, moved):
    net_a = source()
    net = transfer(random_set(), quick(name), n=20, net_a=net_a).net
    pairs = zip(net.stages, net_a.stages)
    assert [any(not torch.equal(a, b) for a, b in zip(x.state_dict().values(), y.state_dict().values())) for x, y in pairs] == moved


def test_sensitive_is_as_long_as_fine_tuning_and_uses_nothing_of_the_source():
    assert sum(p.epochs for p in KNOWN["sensitive"].phases) == sum(p.epochs for p in KNOWN["fine_tuning"].phases)
    runs = [transfer(random_set(), quick("sensitive"), n=20, net_a=source(seed)) for seed in (0, 1)]
    assert fingerprint(runs[0].net) == fingerprint(runs[1].net)


def test_moves_are_phases_alone():
    assert all(s.prepare is None and not any(p.callbacks for p in s.phases) for s in _MOVES)


# --- where it starts ---


def test_the_probe_leaves_the_trunk_and_training_starts_from_it():
    ds, net_a = bright_or_dark(), source()
    at_start = []
    class First(Callback):
        def before_fit(self, loop): at_start.append(copy.deepcopy(loop.net))
    s = Strategy("s", "s", (Phase(1, 3e-4, callbacks=(lambda *given: First(),)),), prepare=KNOWN["lp_ft"].prepare)
    end = transfer(ds, s, n=20, net_a=net_a).net
    probe = transfer(ds, "feature_extraction", n=20, net_a=net_a).net
    assert fingerprint(at_start[0]) == fingerprint(probe) != fingerprint(end)
    assert all(torch.equal(a, b) for a, b in zip(at_start[0].stages.state_dict().values(), net_a.stages.state_dict().values()))


def test_mean_var_keeps_each_tensors_mean_and_std_and_no_pattern():
    net_a = create_model("resnet18", pretrained=False, num_classes=2, size=64)
    with torch.no_grad():
        for i, w in enumerate(trunk(net_a)): w.mul_(1 + i / 10).add_(i / 100)
    net = target(net_a)
    mean_var(net, None, None, 0, None)
    for new, old in [(a, b) for a, b in zip(trunk(net), trunk(net_a)) if a.numel() > 5000]:
        assert abs(new.mean() - old.mean()) < 4 * old.std() / old.numel() ** 0.5
        assert abs(new.std() / old.std() - 1) < 4 / (2 * old.numel()) ** 0.5
        assert abs(torch.corrcoef(torch.stack([new.flatten(), old.flatten()]))[0, 1]) < 4 / old.numel() ** 0.5
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((m.running_mean == 0).all() and (m.running_var == 1).all() for m in norms) and not net.bn_eval


def test_mean_var_differs_by_seed_and_gives_constants_back():
    nets = [target(source()) for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1)): mean_var(net, None, None, seed, None)
    assert fingerprint(nets[0]) == fingerprint(nets[1]) != fingerprint(nets[2])
    assert all((m.weight == 1).all() for m in nets[0].modules() if isinstance(m, nn.BatchNorm2d))


def test_fc6_is_the_first_fully_connected_layer():
    net_a = create_model("alexnet", pretrained=False, num_classes=3, size=64)
    run = transfer(random_set(), "fc6", n=20, net_a=net_a)
    x = net_a.batch(random_set().images[:2])
    assert torch.allclose(run.net.embed(x), net_a.neck[:5](net_a.stages(x)), atol=1e-6) and run.net.head.in_features == 4096
    with pytest.raises(MedxferError, match="no fc6.*pooled"): transfer(random_set(), "fc6", n=20, net_a=source())


# --- without labels ---


def test_pseudo_labels_are_the_surest_answers_of_the_probe():
    ds, net = bright_or_dark(40), target(source())
    both = pseudo_labels(net, ds.take(range(10)), ds.images[10:], 0, None, share=0.2)
    new = both.take(range(10, len(both)))
    p = predict_proba(net, ds.take(range(10, 40))).max(1)
    rows = [int(name.split()[1]) for name in new.table["id"]]
    assert len(new) == 6 and p[rows].min() >= np.delete(p, rows).max() and (both.table["split"] == "train").all()
    np.testing.assert_array_equal(new.images, ds.images[10:][rows])
    np.testing.assert_array_equal(new.target(), predict_proba(net, new).argmax(1))


def test_nt_xent_equals_equation_1_by_hand():
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    like = (F.cosine_similarity(z[:, None], z[None], dim=2) / 0.3).exp()
    by_hand = [-(like[i, (i + 3) % 6] / (like[i].sum() - like[i, i])).log() for i in range(6)]
    torch.testing.assert_close(_nt_xent(z, 0.3), torch.stack(by_hand).mean())


def test_the_self_supervised_step_moves_the_trunk_and_no_label():
    net, net_a, ds = target(source()), source(), random_set()
    back = contrast(net, ds, ds.images[:20], 0, None, epochs=1)
    assert back is ds and net.head.out_features == 2 and fingerprint(net.stages) != fingerprint(net_a.stages)


def test_the_self_supervised_step_takes_a_last_batch_of_one():
    contrast(target(source()), random_set(), random_set(65).images, 0, None, epochs=1)


@pytest.mark.parametrize("name", ["pseudo_labels", "self_supervised"])
def test_nothing_left_to_learn_from_is_an_error(name):
    with pytest.raises(MedxferError, match="smaller n"): transfer(random_set(), name, n=None, net_a=source())


def test_two_penalties_at_once():
    s = Strategy("two", "two", (HEAD, replace(ALL, callbacks=(partial(L2SP, alpha=1), BSS))))
    s = replace(s, phases=tuple(replace(p, epochs=1) for p in s.phases))
    run = transfer(random_set(), s, n=20, net_a=source())
    assert {"L2SP", "BSS"} <= set(run.history) and run.config["callbacks"] == ["L2SP(alpha=1, beta=0.01)", "BSS(eta=0.001, k=1)"]
