"""runtime/linear.py against F.linear: as it is without oneDNN, and with oneDNN wherever PyTorch carries it."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from runtime import linear as module
from runtime.device import can_compile
from runtime.linear import Linear, linear

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.fixture(params=[False, pytest.param(True, marks=onednn)])
def use_onednn(request, monkeypatch):
    monkeypatch.setattr(module, "USE_ONEDNN", request.param)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (1, 1, 8), (0, 8)])
@pytest.mark.parametrize("width", [1, 5, 24])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_f_linear_forward_and_backward(use_onednn, shape, width, bias):
    ours = Linear(8, width, bias=bias)
    theirs = nn.Linear(8, width, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(*shape[:-1], width)
    close(ours(a), theirs(b))
    ours(a).backward(grad)
    theirs(b).backward(grad)
    close(a.grad, b.grad)
    close(ours.weight.grad, theirs.weight.grad)
    with torch.no_grad():
        close(ours(x), theirs(x))


def test_any_strides(use_onednn):
    """Slices, transposes and the gradient of a sum (one number, expanded) are no plain blocks of memory."""
    weight = torch.randn(8, 6, requires_grad=True)
    for x in (torch.randn(4, 5, 12)[:, -1, ::2], torch.randn(6, 5).t(), torch.randn(1, 6).expand(5, 6)):
        close(linear(x, weight), F.linear(x, weight))
        close(linear(x, weight.t().contiguous().t()), F.linear(x, weight))
        (ours,) = torch.autograd.grad(linear(x, weight).sum(), weight)
        (theirs,) = torch.autograd.grad(F.linear(x, weight).sum(), weight)
        close(ours, theirs)


def test_frozen_weights_get_no_gradient(use_onednn):
    x, weight = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6)
    linear(x, weight).sum().backward()
    close(x.grad, weight.sum(0).expand(3, 6))
    assert weight.grad is None


def test_autocast_and_other_precisions_are_f_linear(use_onednn):
    layer, x = Linear(8, 4), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert copy.deepcopy(layer).double()(x.double()).dtype == torch.float64


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
def test_compiled_equals_eager(use_onednn):
    layer, x = Linear(8, 4), torch.randn(3, 8)
    step = torch.compile(lambda x: F.silu(layer(x)).sum())
    step(x).backward()
    compiled = layer.weight.grad.clone()
    layer.weight.grad = None
    F.silu(layer(x)).sum().backward()
    close(compiled, layer.weight.grad)
