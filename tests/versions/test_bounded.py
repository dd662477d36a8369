"""Modules that are built to hold other weights are not initialized, and nothing else of them is left out."""

import torch
from torch import Tensor, nn

from emaswap import Architecture
from emaswap.tensors import named_tensors
from emaswap.versions.architecture import build, fill

TRUSTED = ["tests.versions.test_bounded:*", "tests.versions.*"]


class Rotary(nn.Module):
    """All that a factory does to its tensors: initializations of many kinds, ties, and buffers that are no state."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width, padding_idx=0)
        self.first = nn.Linear(width, width)
        self.norms = nn.Sequential(nn.BatchNorm1d(width), nn.LayerNorm(width), nn.GELU())
        self.last = nn.Conv1d(1, 1, 3, padding=1)
        self.out = nn.Linear(width, 11, bias=False)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.empty(width))
        nn.init.trunc_normal_(self.scale, std=0.02)
        nn.init.orthogonal_(self.first.weight)
        nn.init.constant_(self.first.bias, 0.5)
        with torch.no_grad():
            self.scale.mul_(3).add_(1).clamp_(min=0.5)
        self.register_buffer("angles", 1.0 / 10000 ** (torch.arange(width) / width), persistent=False)
        self.register_buffer("mask", torch.zeros(width).fill_(-1.0).add_(torch.arange(width)), persistent=False)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64).add_(7))

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.norms(self.first(self.embed(rows).mean(1)))
        hidden = self.last(hidden.unsqueeze(1)).squeeze(1) * self.scale
        hidden = hidden + self.get_buffer("angles").cos() + self.get_buffer("mask")
        answer: Tensor = self.out(hidden)
        return answer


class Peeking(nn.Linear):
    """A factory that looks at what it has drawn."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        if not self.weight.abs().max() < 1:
            raise ValueError("these weights are too large")


def test_a_module_that_is_to_hold_others_weights_is_right_once_it_has_them() -> None:
    """Parameters, ties, persistent and other buffers: it answers bit for bit as the module that the weights come from."""
    original = Rotary().eval()
    state = {name: value.detach().clone() for name, value in named_tensors(original).items()}
    built = build(Architecture.of(Rotary), trusted=TRUSTED, like=state)
    fill(built, state)
    rows = torch.randint(0, 11, (5, 4))
    assert torch.equal(built(rows), original(rows))
    assert built.get_parameter("out.weight") is built.get_parameter("embed.weight")
    for name, buffer in original.named_buffers():
        assert torch.equal(buffer, built.get_buffer(name)), name


def test_its_parameters_are_not_drawn() -> None:
    """No random number is drawn for a layer that will hold others; without them its factory's numbers are there."""
    state = nn.Linear(4, 4).state_dict()
    before = torch.get_rng_state()
    build(
        Architecture(factory="torch.nn:Linear", arguments={"in_features": 4, "out_features": 4}),
        trusted=["torch.nn:Linear"],
        like=state,
    )
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    wanted = Rotary()
    torch.manual_seed(2)
    whole = build(Architecture.of(Rotary), trusted=TRUSTED)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in wanted.state_dict().items())


def test_a_factory_that_looks_at_its_weights_is_given_some() -> None:
    """What fails without them is tried with them."""
    state = Peeking().state_dict()
    for _ in range(20):
        built = build(Architecture.of(Peeking), trusted=TRUSTED, like=state)
        fill(built, state)
        assert torch.equal(built.get_parameter("weight"), state["weight"])
