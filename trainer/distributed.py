"""Ranks: the processes that train one model together, as torchrun starts them.

Knows processes, batches and collective operations, but no averages, stores or tasks.
"""

import contextlib
import gc
import inspect
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from emaswap import EmaswapError
from emaswap.device import pick_device
from trainer.batch_norm import synchronise
from trainer.tasks import Batch

_CPU = torch.device("cpu")
# torch has renamed this argument.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. By default it is alone, and every method here is free."""

    rank: int = 0
    size: int = 1
    local: int = 0
    device: torch.device = _CPU
    grouped: bool = False
    """Whether there is a process group, even a group of one."""

    @property
    def leads(self) -> bool:
        """Whether this rank averages, evaluates, publishes, saves and displays."""
        return self.rank == 0

    def share(self, batch: Batch, parts: int = 1) -> list[Batch]:
        """Return this rank's rows of a global batch, in `parts` micro-batches.

        The ranks' shares of a micro-batch are consecutive rows of the batch, so that batch norm sees the same rows on
        one rank as on many. Raises `EmaswapError` when the rows cannot be split evenly.
        """
        pieces = self.size * parts
        if pieces == 1:
            return [batch]
        rows = {len(part) for part in batch}
        if len(rows) != 1 or min(rows) % pieces:
            raise EmaswapError(
                f"a batch of {' and '.join(map(str, sorted(rows)))} rows cannot be split evenly into {self.size} × {parts} "
                "parts (ranks × micro-batches): choose another --batch-size or --accumulate"
            )
        size = min(rows) // pieces
        starts = ((micro * self.size + self.rank) * size for micro in range(parts))
        return [tuple(part[start : start + size] for part in batch) for start in starts]

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a module that computes the loss and gradients that the model alone would compute on the whole batch.

        This changes the batch norms in the model itself: they use the statistics of all ranks' rows.
        """
        if not self.grouped:
            return model
        synchronise(model)
        # `share_buffers` shares buffers once per step. DDP's per-call broadcast changes buffers in place, which breaks a
        # loss that calls the module twice.
        alone: dict[str, Any] = {_SYNC_BUFFERS: False}
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **alone)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers of the leading rank."""
        if self.size == 1:
            return
        buffers = sorted(model.buffers(), key=lambda buffer: str(buffer.dtype))
        for _, group in itertools.groupby(buffers, key=lambda buffer: buffer.dtype):
            alike = list(group)
            flat = torch.cat([buffer.detach().reshape(-1) for buffer in alike])
            distributed.broadcast(flat, 0)
            for buffer, values in zip(alike, torch.split(flat, [buffer.numel() for buffer in alike]), strict=True):
                buffer.detach().copy_(values.view_as(buffer))

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of all ranks' values."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        distributed.all_reduce(total)
        return total / self.size

    def any(self, flag: bool) -> bool:  # noqa: FBT001
        """Return whether the flag is set on any rank; every rank gets the same answer at the same step."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return bool(flags)

    def agree(self, number: int, what: str) -> None:
        """Check that all ranks have the same number. Raises `EmaswapError` on every rank if they do not."""
        if self.size == 1:
            return
        ends = torch.tensor([number, -number])
        distributed.all_reduce(ends, distributed.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise EmaswapError(f"the ranks do not agree on {what}: one has {-ends[1]}, another {ends[0]}")


@contextlib.contextmanager
def joined(device: str, timeout_s: float) -> Iterator[Ranks]:
    """Join the other ranks if RANK, WORLD_SIZE and MASTER_ADDR are set, as torchrun sets them; otherwise be alone.

    Raises `EmaswapError` when this host has fewer CUDA devices than ranks, or the other ranks cannot be reached.
    """
    chosen = pick_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks(device=chosen)
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if chosen.type == "cuda":
        chosen = _device_of(local)
    try:
        distributed.init_process_group(
            # Flags travel by gloo, so that reading one does not wait for a GPU.
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise EmaswapError(f"cannot join the other ranks: {error}") from error
    yield Ranks(distributed.get_rank(), distributed.get_world_size(), local, chosen, grouped=True)
    # Not after an error: destroying a group waits for ranks that may be gone.
    leave_group()


def leave_group() -> None:
    """Destroy the process group, if there is one. The caller must not hold anything that refers to it."""
    # First collect what still refers to the group, such as a wrapped module in a cycle. If such an object held the last
    # reference, releasing it would wait for gloo's threads while holding the GIL, which they need to release a tensor: a
    # deadlock. If it outlived the group, those threads would abort the interpreter as it exits.
    gc.collect()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _device_of(local: int) -> torch.device:
    count = torch.cuda.device_count()
    if local >= count:
        raise EmaswapError(
            f"local rank {local} has no device: torch sees {count} CUDA devices here; start at most {count} ranks"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
