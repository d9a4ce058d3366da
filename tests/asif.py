"""A pretended GPU: the chapters run on it without one, and it tells what a real one would have to do.

Its tensors say that their device is ``cuda`` and compute on the CPU. ``pretended_gpu`` yields a ``GPU``, which counts,
by kind and by the line of the book that asked for it ("file:line function"):

* ``launches``: operations on its tensors, each of them a kernel. Views and empty memory cost none; attention and
  RMSNorm are one forwards, as on a GPU, and the sum of their parts backwards;
* ``syncs``: the program waits for the device, because a number is read or a shape depends on values;
* ``copies``: from the CPU to the device;
* ``mixed``: operations on tensors of both devices, which a real GPU refuses;
* ``doubles``: results in float64, slow on many GPUs and refused by Apple's.

PyTorch itself takes them for meta tensors, so what it makes beside them in C++ arrives here too. A CUDA graph is a list
of calls, made again on the same memory by ``replay``: a step that keeps anything elsewhere goes wrong, as it would. Not
pretended: the rounding of kernels, streams, what is compiled.
"""

import contextlib
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._dynamo  # which has to meet the real machine first
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT, CUDA = str(Path(__file__).parent.parent) + "/", torch.device("cuda", 0)
FREE = {"_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal"}
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
IN_16_BITS = {"linear", "matmul", "__matmul__", "bmm", "mm", "addmm", "baddbmm", "scaled_dot_product_attention"}
IN_FLOAT32 = {"exp", "expm1", "log", "pow", "norm", "layer_norm", "softmax", "log_softmax", "cross_entropy", "cumsum",
              "sum", "prod"}  # fmt: skip
run_backward = torch.autograd.Variable._execution_engine.run_backward


def here() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and "site-packages" not in name and name != __file__:
            return f"{name[len(ROOT) :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class OnGPU(Tensor):
    """A tensor whose values are in ``inside``, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_meta = (property(lambda self, value=value: value) for value in (CUDA, True, False))

    def __new__(cls, inside: Tensor):
        shell = torch.empty_strided(inside.shape, inside.stride(), dtype=inside.dtype, device="meta")
        tensor = Tensor._make_subclass(cls, shell, device_for_backend_keys=CUDA)
        tensor.inside = inside
        return tensor

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        copy = self.detach().clone()
        copy = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        return memo.setdefault(id(self), copy)

    def __reduce_ex__(self, protocol):  # a file holds the values
        return self.inside.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} at {here()}: the pretended GPU of this tensor is gone")


class GPU(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches, self.syncs, self.copies, self.mixed, self.doubles = (Counter() for _ in range(5))
        self.within, self.graph = 0, None  # how deep we are in one kernel; the graph that is recorded

    def note(self, counter: Counter, what: str) -> None:
        if self.graph is not None and counter is self.syncs:
            raise RuntimeError(f"{what} at {here()}, while a graph is recorded")
        if not (self.within and counter is self.launches):
            counter[what, here()] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [isinstance(x, OnGPU) for x in tensors]
        device = kwargs.get("device")
        stays = any(ours) if device is None else torch.device(device).type in ("cuda", "meta")  # the result
        if not (stays or any(ours)):
            return func(*args, **kwargs)
        if device is not None:
            kwargs["device"] = "cpu"
        given = tree_map(lambda x: x.inside if isinstance(x, OnGPU) else x, (args, kwargs))
        if name == "_to_copy" and all(ours) and stays and args[0].dtype == kwargs.get("dtype", args[0].dtype):
            return OnGPU(given[0][0])  # it is there already

        indices = [i for i in args[1] if i is not None] if name in INDEX else []
        written = [True] + len(tensors) * [name in ("cat", "stack")]  # a single number of the CPU may be read elsewhere
        if name == "_to_copy" and not stays or name == "copy_" and ours == [False, True]:
            self.note(self.syncs, "copy to the CPU")
        elif "copy" in name and not all(ours) or ours[:1] == [True] and not all(isinstance(i, OnGPU) for i in indices):
            self.note(self.copies, name)
        elif any(ours) and any(not mine and (x.dim() or no) for x, mine, no in zip(tensors, ours, written)):
            self.note(self.mixed, name)
        if name in WAITS or str(func) == "aten.repeat_interleave.Tensor" or any(i.dtype == torch.bool for i in indices):
            self.note(self.syncs, name)
        result = func(*given[0], **given[1])
        if not (func.is_view or name in FREE or func.namespace == "profiler"):
            self.note(self.launches, name)
            if stays and any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(result)):
                self.note(self.doubles, name)
        if self.graph is not None and not func.is_view:
            self.graph.calls.append((func, *given, result))
        if func._schema.is_mutable:
            return kwargs.get("out", args[0]) if func._schema.returns else None
        return tree_map(lambda x: OnGPU(x) if isinstance(x, Tensor) else x, result) if stays else result

    def one_kernel(self, function, name: str = "compiled"):
        """``function`` as one kernel, whatever it is made of."""

        def call(*args, **kwargs):
            if any(isinstance(x, OnGPU) for x in args):
                self.note(self.launches, name)
            self.within += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.within -= 1

        return call


class Autocast(TorchFunctionMode):
    """What ``torch.autocast("cuda")`` does to a GPU's tensors; each weight is cast once for a context."""

    def __init__(self):
        super().__init__()
        self.cached: dict[int, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name, dtype = kwargs or {}, getattr(func, "__name__", ""), None
        if name == "backward":  # as ``loss.backward()``, but what it computes again is cast again
            with self:
                one = torch.ones_like(args[0])
                return run_backward(args[:1], (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)
        if torch.is_autocast_enabled("cuda"):
            if name in IN_16_BITS:
                dtype = torch.get_autocast_dtype("cuda")
            elif name in IN_FLOAT32 and "dtype" not in kwargs:
                dtype = torch.float32
        if dtype is not None:
            args, kwargs = tree_map(lambda x: self.cast(x, dtype), (args, kwargs))
        return func(*args, **kwargs)

    def cast(self, x, dtype: torch.dtype):
        if not (isinstance(x, OnGPU) and x.is_floating_point()) or x.dtype in (dtype, torch.float64):
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self.cached:
            self.cached[id(x)] = x.to(dtype)
        return self.cached[id(x)]


class Graph:
    """A CUDA graph."""

    def __init__(self, gpu: GPU):
        self.gpu, self.calls = gpu, []

    def replay(self) -> None:
        self.gpu.note(self.gpu.launches, "graph")
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs))):
                if old is not new and isinstance(old, Tensor):
                    old.copy_(new)

    @contextlib.contextmanager
    def record(self):
        self.gpu.graph = self
        yield
        self.gpu.graph = None


@contextlib.contextmanager
def pretended_gpu():
    """One GPU while it lasts."""
    gpu, autocast, nothing = GPU(), Autocast(), lambda *args, **kwargs: None
    move, generator, swap = nn.Module.to, torch.Generator, torch.__future__.set_swap_module_params_on_conversion
    stream, card = SimpleNamespace(wait_stream=nothing), SimpleNamespace(total_memory=80 * 2**30)

    def to(module: nn.Module, *args, **kwargs) -> nn.Module:  # a Parameter cannot change its kind, but be swapped
        swap(True)
        try:
            return move(module, *args, **kwargs)
        finally:
            swap(False)

    patches = {torch.cuda: {
        "_lazy_init": nothing, "is_available": lambda: True, "device_count": lambda: 1, "set_device": nothing,
        "is_bf16_supported": lambda **_: True, "get_device_name": lambda _: "a pretended H100",
        "get_device_properties": lambda _: card, "synchronize": nothing, "Stream": lambda: stream,
        "current_stream": lambda: stream, "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": lambda: Graph(gpu), "graph": Graph.record,
    }}  # fmt: skip
    patches[torch] = {"Generator": lambda device="cpu": generator(), "clear_autocast_cache": autocast.cached.clear}
    patches[nn.Module] = {"to": to}
    patches[F] = {name: gpu.one_kernel(getattr(F, name), name) for name in ("scaled_dot_product_attention", "rms_norm")}
    with contextlib.ExitStack() as stack:
        for where, values in patches.items():
            for name, value in values.items():
                stack.enter_context(patch.object(where, name, value))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device=...) is made here, then moved
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # backward passes below their caller
        stack.enter_context(autocast)
        yield stack.enter_context(gpu)
