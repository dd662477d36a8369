"""Averages of models that several processes train, tried in a real group: `python -m tests.shards RANK FOLDER`, two ranks.

What came of each check on this rank is written to the folder: nothing, or the traceback.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from emaswap import Constant, EmaError, ModelEMA, Schedule
from trainer.distributed import leave_group

RANKS = 2
VARIANTS: dict[str, Schedule] = {"short": Constant(0.25)}


class Net(nn.Module):
    """Layers whose rows can be shared out evenly, unevenly, and not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 5)
        self.last = nn.Linear(5, 1, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.last(self.second(self.norm(self.first(rows)).relu()).tanh())
        return out


def sharded(seed: int = 1, mesh: DeviceMesh | None = None) -> Net:
    """A network in shards, the same on all ranks: one layer by itself, and the rest as the root's.

    As a factory's, its initial weights are not the model's: an average must start at those of the model all the same.
    """
    torch.manual_seed(seed)
    net = Net()
    fully_shard(net.first, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One step on rows of this rank's own."""
    torch.manual_seed(1000 * step + distributed.get_rank())
    model.train()
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The module's state, each tensor gathered from all ranks; every rank must ask."""
    state = module.state_dict()
    return {name: (each.full_tensor() if isinstance(each, DTensor) else each).clone() for name, each in state.items()}


def shards(module: nn.Module) -> list[Tensor]:
    """This rank's parts of the parameters."""
    return [each.to_local() for each in module.state_dict().values() if isinstance(each, DTensor)]


def assert_same(states: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Both states are the same, to the last bit."""
    torch.testing.assert_close(states, expected, rtol=0, atol=0)


def check_the_average_of_shards_is_the_shards_of_the_average() -> None:
    """Averaged in parts, each on its rank, and gathered, it is what averaging whole weights gives, variants and all."""
    model = sharded(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ema = ModelEMA(model, Constant(0.75), variants=VARIANTS, update_every=2, factory=sharded)
    plain = Net()
    plain.load_state_dict(whole(model))
    expected = ModelEMA(plain, Constant(0.75), variants=VARIANTS, update_every=2)
    assert 0 in {part.numel() for part in shards(model)} or distributed.get_rank() == 0
    assert sum(part.numel() for part in shards(ema.ema)) < sum(weight.numel() for weight in plain.parameters())
    for step in range(4):
        train(model, optimizer, step)
        plain.load_state_dict(whole(model))
        assert ema.update(model) is expected.update(plain)
    assert_same(whole(ema.ema), dict(expected.ema.state_dict()))
    assert_same(whole(ema.variants["short"]), dict(expected.variants["short"].state_dict()))


def check_a_number_that_is_not_finite_on_one_rank_is_left_out_on_all() -> None:
    """Wherever it is, in a shard or in a buffer, all ranks leave the step out; and all take the next one in."""
    model = sharded(seed=0)
    ema = ModelEMA(model, Constant(0.5), factory=sharded)
    before = whole(ema.ema)
    rank = distributed.get_rank()
    for count, owner in enumerate((0, 1), start=1):
        part = shards(model)[0]
        own = part.clone()
        if rank == owner:
            part.view(-1)[-1] = float("nan")
        assert ema.update(model) is False
        part.copy_(own)
        assert (ema.updates, ema.skipped) == (0, count)
    mean = model.state_dict()["norm.running_mean"]
    if rank == 1:
        mean.fill_(float("inf"))
    assert ema.update(model) is False
    mean.fill_(0)
    assert_same(whole(ema.ema), before)
    assert ema.update(model) is True
    assert (ema.updates, ema.skipped) == (1, 3)


def check_only_those_who_share_a_tensor_decide_together() -> None:
    """Stages of a pipeline update when they are ready, without the others; what is not finite in one concerns it alone."""
    rank = distributed.get_rank()
    stages = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("stage", "shard"))

    def stage() -> Net:
        return sharded(seed=0, mesh=stages["shard"])

    model = stage()
    ema = ModelEMA(model, Constant(0.5), factory=stage)
    if rank == 1:
        shards(model)[0].fill_(float("nan"))
    for _ in range(rank + 1):
        assert ema.update(model) is (rank == 0)
    assert ema.skipped == (0, 2)[rank]


def check_replicas_of_shards_decide_together() -> None:
    """In a mesh of two dimensions what is not finite on one rank is left out on all."""
    for shape in ((1, RANKS), (RANKS, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        model = sharded(seed=0, mesh=mesh)
        ema = ModelEMA(model, Constant(0.5), factory=partial(sharded, mesh=mesh))
        if distributed.get_rank() == 1:
            shards(model)[0].fill_(float("nan"))
        assert ema.update(model) is False
        assert ema.skipped == 1


def check_a_sharded_model_needs_a_factory() -> None:
    """It cannot be copied; the error names the way out."""
    with pytest.raises(EmaError, match=r"cannot be deep-copied .* give ModelEMA\(..., factory=...\)"):
        ModelEMA(sharded())


def check_evaluating_does_not_stop_the_updates() -> None:
    """A forward pass leaves weights gathered, the model's or the average's: updates go to the shards all the same."""
    model = sharded(seed=0)
    ema = ModelEMA(model, Constant(0.0), factory=sharded)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = torch.ones(2, 3)
    for step in range(2):
        train(model, optimizer, step)
        with torch.inference_mode() if step else torch.no_grad():
            ema.ema(rows)
            model.eval()(rows)
        assert ema.update(model) is True
        assert_same(whole(ema.ema), whole(model))
        with torch.no_grad():
            assert torch.equal(ema.ema(rows), model(rows))


def check_the_average_is_swapped_into_a_sharded_model() -> None:
    """Inside the block the model answers as the average does, and after it, also where weights were gathered, as itself."""
    model = sharded(seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ModelEMA(model, Constant(0.5), variants=VARIANTS, factory=sharded)
    for step in range(2):
        train(model, optimizer, step)
        ema.update(model)
    model.eval()
    rows, own = torch.ones(2, 3), whole(model)
    with torch.no_grad():
        answer = model(rows)  # leaves the weights gathered
        with ema.swapped_into(model, "short"):
            assert torch.equal(model(rows), ema.variants["short"](rows))
            assert not torch.equal(model(rows), answer)
        assert torch.equal(model(rows), answer)
    assert_same(whole(model), own)
    train(model, optimizer, 2)
    assert ema.update(model) is True


def check_an_average_that_is_not_sharded_as_the_model_is_an_error() -> None:
    """A model that was put into shards after its average was made does not match it, on any rank."""
    ema = ModelEMA(Net())
    with pytest.raises(EmaError, match=r"sharded differently: .*first.weight \(expected \[4, 3\], got \[2, 3\]\)"):
        ema.update(sharded())
    with pytest.raises(EmaError, match="sharded differently"):
        ModelEMA(sharded(), factory=Net)
    assert ema.updates == 0


def check_sharded_half_precision_is_averaged_in_float32() -> None:
    """The shards of the average are wide, and its answers those of the gathered average."""

    def half() -> Net:
        torch.manual_seed(0)
        net = Net().bfloat16()
        fully_shard(net)
        return net

    model = half()
    ema = ModelEMA(model, Constant(0.75), factory=half)
    for part in shards(model):
        part.add_(1)
    assert ema.update(model) is True
    assert {each.dtype for each in whole(ema.ema).values()} == {torch.float32, torch.int64}
    plain = Net()
    plain.load_state_dict(whole(ema.ema))
    with torch.no_grad():
        torch.testing.assert_close(ema.ema(torch.ones(2, 3)), plain.eval()(torch.ones(2, 3)))


def check_a_sharded_average_goes_on() -> None:
    """From its state, another average of the same shards goes on to the same bits."""
    model = sharded(seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = ModelEMA(model, variants=VARIANTS, factory=sharded)
    train(model, optimizer, 0)
    first.update(model)
    second = ModelEMA(model, variants=VARIANTS, factory=sharded)
    second.load_state_dict(first.state_dict())
    train(model, optimizer, 1)
    for ema in (first, second):
        ema.update(model)
    assert second.updates == 2
    assert_same(whole(second.ema), whole(first.ema))
    assert_same(whole(second.variants["short"]), whole(first.variants["short"]))


def check_a_compiled_model_of_many_ranks_is_averaged() -> None:
    """Inside `torch.compile` and `DistributedDataParallel`, in either order, the module itself is averaged, alike on all."""

    def compiled(module: nn.Module) -> nn.Module:
        compiled = torch.compile(module, backend="aot_eager")
        assert isinstance(compiled, nn.Module)
        return compiled

    wrappers: list[Callable[[nn.Module], nn.Module]] = [
        lambda module: compiled(DistributedDataParallel(module)),
        lambda module: DistributedDataParallel(compiled(module)),
    ]
    for wrap in wrappers:
        torch.manual_seed(0)
        module = Net()
        wrapper = wrap(module)
        ema = ModelEMA(wrapper, Constant(0.5))
        assert type(ema.ema) is Net
        optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
        expected = {name: weight.detach().double() for name, weight in module.named_parameters()}
        for step in range(3):
            train(wrapper, optimizer, step)
            assert ema.update(wrapper) is True
            for name, weight in module.named_parameters():
                expected[name] = (expected[name] + weight.detach().double()) / 2
        for name, average in ema.ema.named_parameters():
            torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)
            everywhere = [torch.empty_like(average) for _ in range(RANKS)]
            distributed.all_gather(everywhere, average)
            assert torch.equal(everywhere[0], everywhere[1])


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def outcomes() -> dict[str, str]:
    """What came of each check: nothing, or the traceback."""
    found = {}
    for name, check in CHECKS.items():
        try:
            check()
        except (Exception, pytest.fail.Exception):  # the latter where pytest.raises saw nothing
            found[name] = traceback.format_exc()
        else:
            found[name] = ""
    return found


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    distributed.init_process_group(
        "gloo", f"file://{folder / 'group'}", timedelta(seconds=20), rank=rank, world_size=RANKS
    )
    (folder / f"{rank}.json").write_text(json.dumps(outcomes()))
    leave_group()
