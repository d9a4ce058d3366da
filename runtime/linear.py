"""``nn.Linear`` through the faster of the two matrix libraries that PyTorch carries for a CPU.

A float32 matrix product on a CPU goes to MKL, and MKL leaves the 512-bit units of an AMD processor idle: it runs at
half the speed of oneDNN, the library that PyTorch itself uses for 16-bit products. As a language model spends most of
its time in its linear layers, that half is worth the lines below. Everywhere else (another processor, a GPU,
16 bits, autocast) ``linear`` is ``F.linear``. Both libraries sum in float32; results differ by rounding alone.
"""

import os
import platform

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def _amd_with_avx512() -> bool:
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # PyTorch's own name for it, not a promise
        return False
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            return "AuthenticAMD" in file.read()
    return "AuthenticAMD" in platform.processor()


# oneDNN keeps what it compiles for each shape, of 1,024 shapes by default: gigabytes, where every batch has a length of
# its own. A step needs a few dozen. It reads this when it first multiplies.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

USE_ONEDNN = _amd_with_avx512()  # the same on every run of a machine, so a resumed run adds up in the same order


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    if x.numel() == 0:
        return F.linear(x, weight)  # oneDNN refuses a product of nothing
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@torch.library.custom_op("alignbook::product", mutates_args=())  # torch.compile does not look inside
def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., n) and weight (m, n) -> x weightᵀ (..., m), float32 on a CPU; with gradient."""
    return _onednn(x, weight)


@product.register_fake
def _shape(x, weight):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None  # (..., n)
    grad_weight = None
    if ctx.needs_input_grad[1]:
        grad, x = grad.flatten(0, -2).t(), x.flatten(0, -2).t()  # (m, N) and (n, N)
        # gradᵀ x, or the transpose of its transpose: oneDNN is faster when the second factor is the wide one
        grad_weight = product(grad, x) if len(grad) <= len(x) else product(x, grad).t()  # (m, n)
    return grad_x, grad_weight


product.register_autograd(_backward, setup_context=_save)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x (..., n), weight (m, n), bias (m,) -> (..., m)."""
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.dim() > 1
    if not USE_ONEDNN or not fits or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y = product(x, weight)
    else:
        y = _onednn(x, weight)  # without the bookkeeping, which counts when one token is generated at a time
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """``nn.Linear``, with the product above."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
