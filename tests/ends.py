"""Many groups of two ranks, one after another: `python -m tests.ends PORT...` with RANK and WORLD_SIZE set, a group a port.

The wrapped module is in a cycle, as it is when a framework or a user keeps it in one.
"""

import faulthandler
import os
import sys

import torch
from torch import nn

from trainer.distributed import Ranks, joined


class Cycle(nn.Module):
    """Knows what wraps it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.wrapper: list[nn.Module] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layer(rows)  # type: ignore[no-any-return]


def train(ranks: Ranks) -> None:
    """Two steps, and what ranks tell one another."""
    model = Cycle()
    wrapped = ranks.wrap(model)
    model.wrapper.append(wrapped)
    for _ in range(2):
        wrapped(torch.randn(4, 8)).sum().backward()
        ranks.any(flag=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for port in sys.argv[1:]:
        os.environ["MASTER_PORT"] = port
        faulthandler.dump_traceback_later(60, exit=True)
        with joined("cpu", timeout_s=60) as ranks:
            train(ranks)
    faulthandler.cancel_dump_traceback_later()
