"""Ranks: the processes that train one model together, as torchrun starts them.

Knows processes, batches and what they tell one another; nothing of averages, stores or tasks.
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
# torch renamed it.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; by default it is alone, and everything here costs nothing."""

    rank: int = 0
    size: int = 1
    local: int = 0
    device: torch.device = _CPU
    grouped: bool = False
    """Whether there is a process group, even of one."""

    @property
    def leads(self) -> bool:
        """Whether this is the one that averages, evaluates, publishes, saves and displays."""
        return self.rank == 0

    def share(self, batch: Batch, parts: int = 1) -> list[Batch]:
        """This rank's rows of a global batch, in `parts` micro-batches.

        A micro-batch of all ranks together is a run of the batch's rows, so that batch norm sees the same rows in one
        process as in many. Raises `EmaswapError` when the rows cannot be shared out evenly.
        """
        pieces = self.size * parts
        if pieces == 1:
            return [batch]
        rows = {len(part) for part in batch}
        if len(rows) != 1 or min(rows) % pieces:
            raise EmaswapError(
                f"a batch of {' and '.join(map(str, sorted(rows)))} rows cannot be shared out evenly over "
                f"{self.size} ranks × {parts} parts: choose another --batch-size or --accumulate"
            )
        size = min(rows) // pieces
        starts = ((micro * self.size + self.rank) * size for micro in range(parts))
        return [tuple(part[start : start + size] for part in batch) for start in starts]

    def wrap(self, model: nn.Module) -> nn.Module:
        """What computes the same loss and gradients as the model would alone on the whole batch.

        Batch norm is made to use the statistics of all ranks' rows, in the model itself.
        """
        if not self.grouped:
            return model
        synchronise(model)
        # Buffers are shared once a step (`share_buffers`); at each call, as DDP would, they could not be in use twice.
        alone: dict[str, Any] = {_SYNC_BUFFERS: False}
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **alone)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers of the leading one."""
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
        """The mean of all ranks' values."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        distributed.all_reduce(total)
        return total / self.size

    def any(self, flag: bool) -> bool:  # noqa: FBT001  (it is asked of a flag)
        """Whether the flag is set on any rank: the same answer on every one, at the same step."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return bool(flags)

    def agree(self, number: int, what: str) -> None:
        """Raises `EmaswapError` on every rank when they do not all have the same number."""
        if self.size == 1:
            return
        ends = torch.tensor([number, -number])
        distributed.all_reduce(ends, distributed.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise EmaswapError(f"the ranks do not agree on {what}: it is {-ends[1]} on one, and {ends[0]} on another")


@contextlib.contextmanager
def joined(device: str, timeout_s: float) -> Iterator[Ranks]:
    """Join the ranks that torchrun (or whoever sets RANK, WORLD_SIZE and MASTER_ADDR) has started; without, be alone.

    Raises `EmaswapError` when there are fewer CUDA devices here than ranks, or the others are not to be found.
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
            # Flags travel between the hosts by gloo, so that asking for them does not wait for a GPU.
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise EmaswapError(f"cannot join the other ranks: {error}") from error
    yield Ranks(distributed.get_rank(), distributed.get_world_size(), local, chosen, grouped=True)
    # Not after an error: taking a group down waits for ranks that may be gone.
    leave_group()


def leave_group() -> None:
    """Take the process group down, if there is one. Nothing that the caller still holds may know it."""
    # What still knows the group (a wrapped module in a cycle) goes first. Were it the last to let go of the group, that would
    # wait for gloo's threads with the interpreter's lock held, which they need to let go of a tensor: none would ever end.
    # Kept for longer than the group, it would have those threads abort an interpreter that ends.
    gc.collect()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _device_of(local: int) -> torch.device:
    count = torch.cuda.device_count()
    if local >= count:
        raise EmaswapError(f"local rank {local} has no device: torch sees {count} CUDA devices; start at most {count}")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
