"""What ranks tell one another, tried in a real group: `torchrun --nproc-per-node 2 -m tests.ranks STORE`.

Each rank fails where it does not find what it should.
"""

import copy
import itertools
import sys
import threading

import pytest
import torch
from torch import Tensor, distributed, nn

from emaswap import EmaswapError
from tests.hard_tasks import Overflowing, Plain, PlainNet
from trainer.batch_norm import synchronise
from trainer.display import Display
from trainer.distributed import Ranks, joined
from trainer.learner import Learner
from trainer.loop import train
from trainer.settings import TrainerSettings
from trainer.tasks import Batch


class Own(nn.BatchNorm1d):
    """Does more than batch norm."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows).relu()


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d(3), (8, 3)),
    "1d with length": (nn.BatchNorm1d(3), (8, 3, 5)),
    "2d": (nn.BatchNorm2d(3, eps=1e-3, momentum=0.3), (8, 3, 4, 5)),
    "3d": (nn.BatchNorm3d(3), (4, 3, 2, 3, 2)),
    "plain mean of all batches": (nn.BatchNorm2d(3, momentum=None), (8, 3, 2, 2)),
    "without weights": (nn.BatchNorm2d(3, affine=False), (8, 3, 2, 2)),
    "without running statistics": (nn.BatchNorm2d(3, track_running_stats=False), (8, 3, 2, 2)),
    "far from zero": (nn.BatchNorm1d(3), (8, 3)),
}


def check_batch_norm(ranks: Ranks, name: str, layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Answers, gradients and running statistics are those of the plain layer over all rows, after three batches."""
    torch.manual_seed(0)
    whole = layer.double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    shared = copy.deepcopy(whole)
    names = list(shared.state_dict())
    synchronise(shared)
    assert list(shared.state_dict()) == names
    for _ in range(3):
        rows = torch.randn(shape, dtype=torch.float64) + (1e4 if name == "far from zero" else 1)
        target = torch.randn(shape, dtype=torch.float64)
        all_rows, own_rows = rows.clone().requires_grad_(), rows.chunk(ranks.size)[ranks.rank].clone().requires_grad_()
        answer = whole(all_rows)
        (answer * target).sin().sum().backward()
        own = shared(own_rows)
        (own * target.chunk(ranks.size)[ranks.rank]).sin().sum().backward()
        close(own, answer.chunk(ranks.size)[ranks.rank])
        assert own_rows.grad is not None
        assert all_rows.grad is not None
        close(own_rows.grad, all_rows.grad.chunk(ranks.size)[ranks.rank])
        for parameter, other in zip(shared.parameters(), whole.parameters(), strict=True):
            assert parameter.grad is not None
            close(ranks.mean(parameter.grad) * ranks.size, other.grad)
    for state, other in zip(shared.state_dict().values(), whole.state_dict().values(), strict=True):
        close(state, other)
    rows = torch.randn(shape, dtype=torch.float64)
    close(shared.eval()(rows), whole.eval()(rows))


def check_messages(ranks: Ranks) -> None:
    """Every rank learns the same."""
    assert ranks.any(flag=ranks.rank == 1)
    assert not ranks.any(flag=False)
    assert ranks.mean(torch.tensor(float(ranks.rank))) == (ranks.size - 1) / 2
    ranks.agree(5, "five")
    with pytest.raises(EmaswapError, match="do not agree on the rank: one has 0, another 1"):
        ranks.agree(ranks.rank, "the rank")


def check_buffers(ranks: Ranks) -> None:
    """Every rank ends with the leading one's buffers, whatever their types and layouts; parameters are left alone."""
    module = nn.Module()
    values = {"a": torch.ones(2, 3), "b": torch.arange(4), "c": torch.ones(3), "d": torch.tensor(0.5).double()}
    for name, value in values.items():
        module.register_buffer(name, value.clone() * (1 + ranks.rank))
    module.register_buffer("e", (torch.arange(6.0).view(2, 3) * (1 + ranks.rank)).t())
    module.weight = nn.Parameter(torch.full((2,), float(ranks.rank)))
    ranks.share_buffers(module)
    buffers = dict(module.named_buffers())
    for name, value in values.items():
        assert torch.equal(buffers[name], value), name
    assert torch.equal(buffers["e"], torch.arange(6.0).view(2, 3).t())
    assert module.weight.tolist() == [float(ranks.rank)] * 2


def check_shares(ranks: Ranks) -> None:
    """Together, the ranks' micro-batches are the batch, and each micro-batch of all is a run of its rows."""
    batch = torch.arange(12), torch.arange(24).view(12, 2)
    parts = [Ranks(rank, ranks.size).share(batch, 3) for rank in range(ranks.size)]
    together = [torch.cat([part[0] for part in parts]) for parts in zip(*parts, strict=True)]
    assert torch.cat(together).tolist() == list(range(12))
    for mine in itertools.chain(*parts):
        assert torch.equal(mine[1][:, 0], mine[0] * 2)


def close(one: Tensor, other: Tensor | None) -> None:
    """Equal, but for the rounding of numbers of this type."""
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


class Drawing(Plain):
    """Remembers what it drew."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.drawn.append(torch.rand((), dtype=torch.float64).item())
        return super().loss(model, batch)


def check_random_numbers(ranks: Ranks, store: str) -> None:
    """In a run each rank draws numbers of its own at each step."""
    task = Drawing()
    settings = TrainerSettings.model_validate({"store": store, "steps": 5})
    assert train(settings, task, Display(5, quiet=True), threading.Event(), ranks) == 5
    own = torch.tensor(task.drawn, dtype=torch.float64)
    all_drawn = [torch.empty_like(own) for _ in range(ranks.size)]
    distributed.all_gather(all_drawn, own)
    assert len(set(torch.cat(all_drawn).tolist())) == 5 * ranks.size


def check_overflow(ranks: Ranks) -> None:
    """What overflows in the rows of one rank is left out by all, and all learn from the next batch."""
    task, model = Overflowing(), PlainNet()
    learner = Learner(TrainerSettings.model_validate({"store": "none", "precision": "fp16"}), task, model, ranks)
    rows, labels, factors = task.batch(0, 64, 0)
    factors[-1] = torch.inf  # a row of the last rank
    for stepped, batch in ((False, (rows, labels, factors)), (True, task.batch(1, 64, 0))):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        learner.backward(batch)
        assert learner.step() == stepped
        for parameter, was in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, was) != stepped
            close(ranks.mean(parameter), parameter.detach())


if __name__ == "__main__":
    with joined("cpu", timeout_s=60) as ranks:
        assert ranks.size == 2
        for name, (layer, shape) in LAYERS.items():
            check_batch_norm(ranks, name, layer, shape)
        own = nn.Sequential(Own(3))
        synchronise(own)
        assert type(own[0]) is Own
        check_messages(ranks)
        check_buffers(ranks)
        check_shares(ranks)
        check_overflow(ranks)
        check_random_numbers(ranks, sys.argv[1])
    print("all is well", flush=True)
