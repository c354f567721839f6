"speed: gradients against autograd's own, what the mode touches and what not, measuring without a trace, choices that are kept."
import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medxfer_nb import speed
from medxfer_nb.backbones import create_model
from medxfer_nb.core import MedxferError
from medxfer_nb.speed import Choice, adamw, depthwise_input_grad, depthwise_weight_grad, fastest, flops, kept_memory, measure, quick


def small(**options): return create_model("small_cnn", pretrained=False, num_classes=2, size=32, **options)


def depthwise(k=5, stride=1, padding=2, channels=6, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, k, stride, padding, groups=channels, bias=bias, dtype=dtype)


def gradients(conv, x, mode):
    x = x.clone().requires_grad_(True)
    with mode: y = conv(x)
    wanted = [x, *(p for p in conv.parameters() if p.requires_grad)]
    return y, torch.autograd.grad(y.square().sum(), wanted)


def agrees(conv, side):
    "Whether `depthwise_weight_grad`, and its way for 16 bits, give the gradient of autograd on a map of this side."
    x = torch.randn(3, 6, *side, dtype=torch.float64)
    y = conv(x)
    g = torch.randn_like(y)
    expected, = torch.autograd.grad(y, conv.weight, g)
    for way in (depthwise_weight_grad, speed._by_products):
        torch.testing.assert_close(way(x, g, conv.kernel_size, conv.stride, conv.padding), expected)


@pytest.mark.parametrize("k", [(5, 5), (7, 7), (5, 7)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("side", [(9, 9), (12, 8)])
def test_weight_gradient_is_autograd_s(k, stride, padding, side):
    agrees(depthwise(k, stride, padding, dtype=torch.float64), side)


@pytest.mark.parametrize("k", [(3, 3), (5, 5), (7, 5), (9, 9)])
@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
@pytest.mark.parametrize("side", [(1, 1), (2, 2), (3, 3), (4, 2), (4, 4)])
def test_weight_gradient_on_maps_smaller_than_the_window(k, stride, side):
    agrees(depthwise(k, stride, (k[0] // 2, k[1] // 2), dtype=torch.float64), side)


@pytest.mark.parametrize("side, stride, way", [(2, 1, "_by_pairs"), (3, 1, "_by_products"), (6, 1, "_by_products"), (6, 2, "_by_products"),
                                               (9, 2, "_as_convolution"), (7, 1, "_as_convolution")])
def test_weight_gradient_in_16_bits(side, stride, way):
    conv, exact = depthwise(stride=stride), depthwise(stride=stride, dtype=torch.float64)
    x = torch.randn(16, 6, side, side).bfloat16()
    y = exact(x.double())
    g = torch.randn_like(y).bfloat16()
    expected, = torch.autograd.grad(y, exact.weight, g.double())
    found = depthwise_weight_grad(x, g, (5, 5), conv.stride, conv.padding)
    assert speed._way(x, g, (5, 5), conv.padding).__name__ == way and found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.005 * expected.norm()  # a number of 16 bits is off by 0.0017 of itself, in the mean


@pytest.mark.parametrize("k", [(1, 1), (3, 3), (5, 5), (5, 7)])
@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2)])
@pytest.mark.parametrize("padding", [0, 1, (2, 3), 6])
@pytest.mark.parametrize("side", [(9, 9), (12, 8), (7, 10)])
def test_input_gradient_is_autograd_s(k, stride, padding, side):
    conv, x = depthwise(k, stride, padding, dtype=torch.float64), torch.randn(3, 6, *side, dtype=torch.float64, requires_grad=True)
    y = conv(x)
    g = torch.randn_like(y)
    expected, = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(depthwise_input_grad(g, conv.weight.detach(), side, conv.stride, conv.padding), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_mode_changes_rounding_only(bias, stride, layout):
    conv, x = depthwise(stride=stride, bias=bias), torch.randn(4, 6, 12, 12).contiguous(memory_format=layout)
    (y, plain), (z, ours) = gradients(conv, x, torch.enable_grad()), gradients(conv, x, quick())
    assert torch.equal(y, z) and "_Depthwise" in type(z.grad_fn).__name__
    for a, b in zip(plain, ours): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_frozen_weights_get_no_gradient():
    conv = depthwise().requires_grad_(False)
    x = torch.randn(2, 6, 8, 8)
    (_, (ours,)), (_, (plain,)) = gradients(conv, x, quick()), gradients(conv, x, torch.enable_grad())
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conv", [
    nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 12, 5, groups=6), nn.Conv2d(6, 6, 5), nn.Conv2d(6, 6, 5, groups=6, dilation=2),
    nn.Conv2d(6, 6, 5, groups=6, padding="same"), nn.Conv2d(6, 6, 5, groups=6, padding=2, padding_mode="reflect", dtype=torch.float64),
], ids=["3 x 3", "two channels each", "not depthwise", "dilated", "padding by name", "float64"])
def test_everything_else_is_left_to_the_library(conv):
    y, _ = gradients(conv, torch.randn(2, 6, 12, 12, dtype=conv.weight.dtype), quick())
    assert "_Depthwise" not in type(y.grad_fn).__name__


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
@pytest.mark.parametrize("side", [1, 2, 7])
def test_a_pointwise_convolution_is_a_product(bias, stride, side):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 10, 1, stride, bias=bias), torch.randn(4, 6, side, side).contiguous(memory_format=torch.channels_last)
    (y, plain), (z, ours) = gradients(conv, x, torch.enable_grad()), gradients(conv, x, quick())
    assert z.is_contiguous(memory_format=torch.channels_last) and "Convolution" not in type(z.grad_fn).__name__
    torch.testing.assert_close(y, z)
    for a, b in zip(plain, ours): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [2, 3, 12])
@pytest.mark.parametrize("bias", [True, False])
def test_half_the_digits_give_the_gradients_of_all_digits_but_for_rounding(k, stride, side, bias):
    "Judged by float64; the products of 16 bits have about 3 digits, and sums of many are no worse."
    conv = depthwise(k, stride, k // 2, bias=bias, dtype=torch.float64) if k > 1 else nn.Conv2d(6, 10, 1, stride, bias=bias, dtype=torch.float64)
    x = torch.randn(8, 6, side, side, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    _, exact = gradients(conv, x, torch.enable_grad())
    conv.float()
    leaf = x.float().requires_grad_(True)
    with quick(), torch.autocast("cpu", torch.bfloat16): y = conv(leaf)
    assert y.dtype == torch.bfloat16
    wanted = [leaf, *conv.parameters()]
    found = torch.autograd.grad(y.float().square().sum(), wanted)
    for a, b, p in zip(exact, found, wanted):
        assert b.dtype == p.dtype == torch.float32
        assert (a - b).norm() < 0.02 * a.norm()


def test_nothing_stays_behind():
    conv, x = depthwise(), torch.randn(2, 6, 12, 12)
    with quick(): conv(x)
    assert "_Depthwise" not in type(conv(x).grad_fn).__name__


def test_it_says_that_it_cannot_be_differentiated_twice():
    conv, x = depthwise(), torch.randn(2, 6, 8, 8)
    with quick(): y = conv(x).square().sum()
    g, = torch.autograd.grad(y, conv.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): g.sum().backward()


@pytest.mark.parametrize("act", [nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.Mish, nn.Hardsigmoid])
def test_an_activation_in_place_does_so_only_where_nothing_has_to_be_copied(act):
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    def through(mode, inplace):
        before = x * 1
        with mode: y = act(inplace=inplace)(before)
        return y, y is before, torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else None
    (y, same, g), (plain, _, expected) = through(quick(), True), through(torch.enable_grad(), False)
    assert not same and torch.equal(y, plain) and torch.equal(g, expected)
    with torch.no_grad(): assert through(quick(), True)[1]


MEMORY = """
import resource, torch
from medxfer_nb.speed import kept_memory
def step(): blocks = [torch.ones(2_000_000) for _ in range(20)]
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3): step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
step()
usual = pages()
with kept_memory():
    step()
    with kept_memory(): step()
    kept = pages()
print(usual, kept, pages())
"""


@pytest.mark.skipif(speed._malloc() is None, reason="not the GNU C library")
def test_memory_stays_with_the_process_and_is_given_back():
    usual, kept, after = map(int, subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout.split())
    assert kept < usual / 10 and after > 10 * kept


def test_without_the_gnu_library_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr(speed, "_malloc", lambda: None)
    with kept_memory(): assert torch.ones(3).sum() == 3


def test_what_lies_channel_by_channel_stays_a_convolution():
    conv, x = nn.Conv2d(6, 10, 1), torch.randn(2, 6, 5, 5)
    with quick(): assert "Convolution" in type(conv(x).grad_fn).__name__


def test_a_network_with_large_windows_gets_the_same_gradients():
    net, x = create_model("mobilenet_v3_small", pretrained=False, num_classes=2, size=64).train(), torch.randn(4, 3, 64, 64)
    net.bn_eval = True
    net.train()
    found = []
    for mode in (torch.enable_grad(), quick()):
        torch.manual_seed(0)
        net.zero_grad()
        with mode: loss = F.cross_entropy(net(x), torch.tensor([0, 1, 0, 1]))
        loss.backward()
        found.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_fused_adamw_makes_the_same_steps():
    plain, fused = nn.Linear(5, 3), nn.Linear(5, 3)
    fused.load_state_dict(plain.state_dict())
    for net, make in ((plain, torch.optim.AdamW), (fused, adamw)):
        optimiser, chance = make(net.parameters(), lr=0.1, weight_decay=0.1), torch.Generator().manual_seed(0)
        for _ in range(20):
            optimiser.zero_grad()
            net(torch.randn(8, 5, generator=chance)).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(plain.weight, fused.weight)


# --- measuring ---


def test_a_way_far_behind_is_not_measured_again(monkeypatch):
    "Each way warms up and has a turn; only what is near the best has more of them, and the shortest counts."
    spent, asked = {"float32": [9, 4, 3, 5], "bfloat16": [9, 9, 9, 9]}, []
    def clock(net, x, start, layout, precision):
        asked.append((layout, precision))
        return spent[precision][asked.count((layout, precision)) - 1] * (1.25 if layout == "contiguous" else 1)
    monkeypatch.setattr(speed, "_seconds", clock)
    table = measure(small(), 2)
    assert table.loc["channels last", "float32"] == 3000 and table.loc["contiguous", "float32"] == 3750
    assert (table["bfloat16"] == [9000, 11250]).all() and list(table) == ["float32", "bfloat16"]
    assert [asked.count((layout, p)) for layout in table.index for p in table] == [4, 2, 4, 2]


def test_measuring_leaves_no_trace():
    net, chance = small().eval(), torch.get_rng_state()
    state = copy.deepcopy(net.state_dict())
    table = measure(net, batch_size=4, rounds=1)
    assert (table > 0).all(axis=None) and table.shape == (2, 2)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and not net.training
    assert torch.equal(torch.get_rng_state(), chance) and all(p.grad is None for p in net.parameters())


def test_what_is_computed_once_is_not_measured():
    "All four ways ask the first stage, twice; where the step starts behind it, it is asked once for all of them."
    net, asked = small(), []
    net.stages[0].requires_grad_(False)
    net.stages[0].register_forward_pre_hook(lambda *_: asked.append(1))
    measure(net, 2, 1)
    assert len(asked) == 8
    measure(net, 2, 1, start=1)
    assert len(asked) == 8 + 1


def test_all_frozen_is_a_clear_error():
    with pytest.raises(MedxferError, match="every weight is frozen"): measure(small().requires_grad_(False))


@pytest.fixture
def measured(monkeypatch, tmp_path):
    "Measurements that the test sets, and how often somebody asked for one."
    monkeypatch.setenv("MEDXFER_CACHE", str(tmp_path))
    asked, table = [], copy.deepcopy(measure(small(), 2, 1))
    monkeypatch.setattr(speed, "measure", lambda net, batch_size, start: asked.append(batch_size) or table)
    return asked, table


@pytest.mark.parametrize(("times", "choice"), [
    ([10, 8, 12, 12], Choice("channels last", "bfloat16")), ([10, 9.5, 9.9, 12], Choice()), ([10, 12, 5, 6], Choice("contiguous", "float32")),
])
def test_the_fastest_is_chosen_if_it_is_a_tenth_faster(measured, times, choice):
    measured[1].loc[:] = torch.tensor(times, dtype=torch.float64).view(2, 2).numpy()
    assert fastest(small()) == choice


def test_a_choice_is_made_once_for_each_case_and_kept(measured, tmp_path):
    asked, table = measured
    table.loc[:] = [[10.0, 5.0], [11.0, 12.0]]
    first = fastest(small())
    table.loc[:] = [[5.0, 10.0], [11.0, 12.0]]
    assert fastest(small()) == first == Choice("channels last", "bfloat16") and asked == [16]
    part = small()
    part.stages[:2].requires_grad_(False)
    assert fastest(part) == fastest(part, start=2) == fastest(small(), batch_size=8) == Choice() and asked == [16, 16, 16, 8]
    assert len(json.loads((tmp_path / "speed" / "choices.json").read_text())) == 4


def test_the_first_of_two_workers_has_its_way(monkeypatch, tmp_path):
    "Both find nothing and measure at once; what the other kept meanwhile counts, so that all runs of a study train in the same way."
    monkeypatch.setenv("MEDXFER_CACHE", str(tmp_path))
    table = measure(small(), 2, 1)
    def slowly(net, batch_size, start):
        monkeypatch.setattr(speed, "measure", lambda net, batch_size, start: table * np.array([[1, 0.1], [1, 1]]))
        assert fastest(net, batch_size).precision == "bfloat16"      # the other is done while we still measure
        return table * np.array([[1, 9], [1, 9]])
    monkeypatch.setattr(speed, "measure", slowly)
    table.loc[:] = 10.0
    assert fastest(small()) == Choice("channels last", "bfloat16")


# --- counting ---


def test_operations_of_a_plain_network_are_those_counted_by_hand():
    net = small()
    convs = [m for m in net.stages.modules() if isinstance(m, nn.Conv2d)]
    sides = []
    hooks = [m.register_forward_hook(lambda m, args, out: sides.append(out.shape[2])) for m in convs]
    net(torch.zeros(1, 3, 32, 32))
    for hook in hooks: hook.remove()
    forward = [2 * m.weight.numel() * side**2 for m, side in zip(convs, sides)] + [2 * net.head.weight.numel()]
    assert flops(net) == (0, 3 * sum(forward) - forward[0])         # nobody needs the gradient of the pictures
    net.stages.requires_grad_(False)
    assert flops(net, len(net.stages)) == (sum(forward[:-1]), 2 * forward[-1])
    assert flops(net) == (0, sum(forward[:-1]) + 2 * forward[-1])


def test_counting_leaves_the_network_as_it_was_and_takes_grouped_convolutions_as_such():
    net = create_model("mobilenet_v2", pretrained=False, num_classes=2, size=224)
    state = copy.deepcopy(net.state_dict())
    _, each = flops(net)
    assert 1.5e9 < each < 2.0e9  # 300 million multiply-adds forward (Sandler et al. 2018), three times that for a step
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and next(net.parameters()).device.type == "cpu"
