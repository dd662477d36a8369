"""Published averages, and averages that are synthesised from them."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emaswap import (
    Architecture,
    Constant,
    DirectoryStore,
    EmaError,
    InverseGamma,
    ModelEMA,
    PowerFunction,
    Publisher,
    Scaled,
    Schedule,
    snapshots_of,
    synthesize,
)
from emaswap.store.keys import tensors_key
from emaswap.versions.architecture import build, fill
from tests.models import Linear

NARROW, WIDE = PowerFunction.from_sigma_rel(0.05), PowerFunction.from_sigma_rel(0.10)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the Euclidean distance of two states."""
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in other))


@dataclass
class Run:
    """A training run that publishes into a store: a `Linear` on a random walk."""

    store: DirectoryStore
    model: Linear
    ema: ModelEMA
    publisher: Publisher

    def walk(self, updates: int, *, every: int) -> None:
        """So many updates, a version every few of them."""
        for _ in range(updates):
            with torch.no_grad():
                for weight in self.model.parameters():
                    weight.add_(torch.randn_like(weight))
            self.ema.update(self.model)
            if self.ema.updates % every == 0:
                self.publish()

    def publish(self, module: ModelEMA | nn.Module | None = None) -> None:
        """Publish the average, or something else, as the next version."""
        self.publisher.publish(self.ema if module is None else module)
        self.publisher.flush()


Begin = Callable[..., Run]


@pytest.fixture
def begin(store: DirectoryStore) -> Iterator[Begin]:
    """Begins a training run over the store."""
    publishers = []
    torch.manual_seed(0)

    def begin(schedule: Schedule = NARROW, **arguments: Any) -> Run:
        model = Linear()
        publisher = Publisher(
            store, name="walk", architecture=Architecture.of(Linear), probe=torch.zeros(1, 3), keep=1000
        )
        publishers.append(publisher)
        return Run(store, model, ModelEMA(model, schedule, **arguments), publisher)

    yield begin
    for publisher in publishers:
        publisher.close()


def test_published_versions_give_an_average_that_was_not_tracked(begin: Begin) -> None:
    """Versions with a variant hold all it takes: what comes out fills the network that they describe."""
    target = PowerFunction.from_sigma_rel(0.075)
    run = begin(variants={"wide": WIDE, "target": target})
    run.walk(200, every=10)
    snapshots = [*snapshots_of(run.store), *snapshots_of(str(run.store.root), variant="wide")]
    assert [snapshot.updates for snapshot in snapshots] == [*range(10, 201, 10)] * 2
    assert [snapshot.schedule for snapshot in snapshots] == [NARROW] * 20 + [WIDE] * 20
    found = synthesize(snapshots, target)
    direct = run.ema.variants["target"].state_dict()
    assert distance(found, direct) < 0.01 * distance(run.ema.ema.state_dict(), direct)
    network = build(run.store.manifest(20).architecture, trusted=["tests.models:Linear"])
    fill(network, found)
    assert torch.equal(network.state_dict()["layer.bias"], found["layer.bias"])


def test_a_published_average_is_itself(begin: Begin) -> None:
    """The newest version's own average, asked for by its schedule, is that version's weights."""
    run = begin(Scaled(InverseGamma(0.99), 2))
    run.walk(40, every=10)
    found = synthesize(snapshots_of(run.store), Scaled(InverseGamma(0.99), 2))
    torch.testing.assert_close(found, dict(run.ema.ema.state_dict()), rtol=1e-6, atol=1e-6)


def test_what_a_resumed_training_left_behind_is_passed_over(begin: Begin) -> None:
    """Where training went on from before its newest version, the versions after that belong to another past."""
    run = begin()
    run.walk(30, every=10)
    kept = copy.deepcopy(run.ema.state_dict())
    run.walk(20, every=10)
    again = begin()
    again.ema.load_state_dict(kept)
    again.walk(30, every=10)
    snapshots = snapshots_of(run.store)
    assert [snapshot.updates for snapshot in snapshots] == [10, 20, 30, 40, 50, 60]
    weights = [state["layer.weight"] for state in (s.tensors() for s in snapshots if callable(s.tensors))]
    torch.testing.assert_close(weights[-1], again.ema.ema.state_dict()["layer.weight"], rtol=0, atol=0)
    assert [manifest_updates(run.store, version) for version in range(1, 9)] == [10, 20, 30, 40, 50, 40, 50, 60]


def manifest_updates(store: DirectoryStore, version: int) -> int:
    """The updates that a version's average had seen."""
    return store.manifest(version).ema.updates


def test_what_cannot_be_used_is_passed_over(begin: Begin) -> None:
    """Versions that were pruned, cannot be read, or are no average are left out; so are those before `since`."""
    run = begin()
    run.walk(60, every=10)
    run.publish(run.model)
    (run.store.root / tensors_key("weights", run.store.manifest(2).weights.digest)).unlink()
    (run.store.root / "versions/00000004.json").write_text("{}")
    (run.store.root / "versions/00000005.json").unlink()
    assert [snapshot.updates for snapshot in snapshots_of(run.store)] == [10, 30, 60]
    assert [snapshot.updates for snapshot in snapshots_of(run.store, since=3)] == [30, 60]


def test_a_store_without_such_averages_is_refused(begin: Begin) -> None:
    """The error says what was expected, and which variants there are."""
    run = begin(variants={"wide": WIDE})
    run.publish(run.model)
    with pytest.raises(EmaError, match=f"from a ModelEMA, but {run.store.location} has none$"):
        snapshots_of(run.store)
    run.publish()
    with pytest.raises(EmaError, match="with the variant 'narrow', but .* has none; its variants: wide$"):
        snapshots_of(run.store, variant="narrow")


@dataclass(frozen=True)
class Described(Constant):
    """A schedule that describes itself in words of its own."""

    words: tuple[tuple[str, Any], ...] = ()

    def describe(self) -> dict[str, Any]:
        return dict(self.words)


def test_a_schedule_that_nobody_knows_is_refused(begin: Begin) -> None:
    """A version with a schedule of somebody's own is an error that names both, rather than a guess."""
    run = begin(Described(0.9, (("name", "lunar"),)))
    run.walk(10, every=10)
    with pytest.raises(EmaError, match="version 1: unknown schedule 'lunar'"):
        snapshots_of(run.store)


def test_the_interval_is_read_from_the_manifest(begin: Begin) -> None:
    """A manifest that says at which interval its average took updates in is believed."""
    words = (("name", "constant"), ("decay", 0.9))
    run = begin(Described(0.9, words), update_every=5)
    run.walk(50, every=10)
    snapshots = snapshots_of(run.store)
    assert {(snapshot.schedule, snapshot.update_every) for snapshot in snapshots} == {(Constant(0.9), 5)}
    found = synthesize(snapshots, Constant(0.9))
    torch.testing.assert_close(found, dict(run.ema.ema.state_dict()), rtol=1e-6, atol=1e-6)
