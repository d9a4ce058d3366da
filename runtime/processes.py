"""Several processes, one model: what ``torchrun`` starts, and the three sums that data parallelism is made of.

Every process holds the whole model and its share of the batch. Each stage divides its loss by a count over the whole
batch (the tokens of all processes), so the gradient of the whole batch is the plain sum of the processes' gradients;
``sum_gradients`` takes it after the last backward pass. There is no wrapper around the model, hence no attribute
access that goes around one and leaves gradients unsynchronised, and no ``module.`` in front of the names of the
weights.
"""

import datetime
import os

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import UserError

_BUCKET = 2**25  # elements of one all-reduce: few large messages, little extra memory

# How long a process waits for the others: when one of them is gone, or stuck, the rest should end too. Where one works
# alone (it tokenises a corpus, it examines a model) the others wait with ``barrier(alone=True)``.
TIMEOUT, PATIENCE = datetime.timedelta(minutes=20), datetime.timedelta(days=2)
_patient = None  # the group with which they do


def setup_processes(device_name: str = "auto") -> tuple[int, int, int]:
    """Join the group if ``torchrun`` started us: (rank, world size, local rank). gloo on CPUs, nccl on GPUs."""
    global _patient
    (rank, world), local = launched(), int(os.environ.get("LOCAL_RANK", "0"))
    if world > 1 and not dist.is_initialized():
        on_gpu = torch.cuda.is_available() and device_name in ("auto", "cuda")
        if on_gpu:
            n = torch.cuda.device_count()
            if local >= n:
                raise UserError(f"{world} processes but {n} GPU(s): use --nproc_per_node={n}, or --device cpu")
            torch.cuda.set_device(local)
        # Counts and rewards may live on the CPU while the model lives on a GPU: each kind of tensor has its way to
        # meet.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return rank, world, local


def launched() -> tuple[int, int]:
    """(rank, world size) as ``torchrun`` launched us, whether or not the processes have met yet."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def print_once(*lines: str) -> None:
    """Print lines in one process, before the processes have met."""
    if launched()[0] == 0:
        for line in lines:
            print(line)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier(alone: bool = False) -> None:
    """Wait until all processes are here. alone: one of them does something on its own before, however long it takes."""
    if dist.is_initialized():
        dist.barrier(group=_patient if alone else None)


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of ``value`` over all processes, without gradient."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gather(value: Tensor) -> Tensor:
    """The rows of all processes, by rank: (N, ...) -> (world · N, ...). Every process must bring the same shape."""
    if not dist.is_initialized():
        return value
    out = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(out, value.contiguous())
    return torch.cat(out)


def gather_objects(value) -> list:
    """The Python values of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    out = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def my_share(rows):
    """This process's contiguous part of a batch that all processes know. The batch must divide evenly."""
    n, world = len(rows), world_size()
    if n % world:
        raise ValueError(f"{n} rows cannot be shared evenly by {world} processes")
    return rows[rank() * n // world : (rank() + 1) * n // world]


def sum_numbers(numbers: list[float]) -> list[float]:
    """The sum of each number over all processes, which must have equally many."""
    return sum_over_processes(torch.tensor(numbers, dtype=torch.float64)).tolist()


@torch.no_grad()
def sum_gradients(parameters) -> None:
    """Replace each gradient by its sum over all processes. A weight that none of them used (an idle expert's) keeps
    None: an optimizer would move it for a gradient of zero."""
    if not dist.is_initialized():
        return
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        return
    used = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device, dtype=torch.float32)
    dist.all_reduce(used)
    bucket: list[Tensor] = []
    size = 0

    def flush():
        nonlocal bucket, size
        if bucket:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(part.view_as(g))
        bucket, size = [], 0

    for parameter, n in zip(parameters, used.tolist()):
        if not n:
            continue
        if parameter.grad is None:  # unused here but not elsewhere: all processes must send the same tensors
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.grad.numel()
        if size >= _BUCKET:
            flush()
    flush()
