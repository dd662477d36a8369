"""Averages that were not tracked, from snapshots of those that were."""

import itertools
import math
import re
import tracemalloc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from emaswap import (
    Architecture,
    Constant,
    CountRamp,
    EmaError,
    ExponentialRamp,
    InverseGamma,
    ModelEMA,
    PowerFunction,
    Scaled,
    Schedule,
    Snapshot,
    StoreError,
    synthesize,
)
from emaswap.averaging.synthesis import coefficients, profile_weights
from tests.models import Everything, Linear
from tests.serving import ROOT

NARROW, WIDE = PowerFunction.from_sigma_rel(0.05), PowerFunction.from_sigma_rel(0.10)
SCHEDULES = [
    Constant(0.9),
    Constant(0.0),
    Constant(1.0),
    ExponentialRamp(0.99, 20.0),
    CountRamp(0.95),
    InverseGamma(0.99),
    NARROW,
    WIDE,
    Scaled(WIDE, 4),
]
NOTHING: dict[str, Tensor] = {}


class Vector(nn.Module):
    """Its weights are one vector, in float64."""

    def __init__(self, size: int, start: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), start, dtype=torch.float64))


def walked(
    schedule: Schedule, variants: Mapping[str, Schedule], *, updates: int, every: int, update_every: int = 1
) -> tuple[ModelEMA, list[Snapshot]]:
    """A random walk of 200 numbers, its averages at the end, and a snapshot of the first one every so often."""
    generator = torch.Generator().manual_seed(0)
    model = Vector(200)
    ema = ModelEMA(model, schedule, variants=variants, update_every=update_every)
    snapshots = []
    for update in range(1, updates + 1):
        with torch.no_grad():
            model.weight.add_(torch.randn(200, dtype=torch.float64, generator=generator))
        ema.update(model)
        if update % every == 0:
            snapshots.append(Snapshot.of(ema))
    return ema, snapshots


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Between two states, of the floating-point tensors."""
    squares = [(one[name] - other[name]).double().square().sum() for name in other if other[name].is_floating_point()]
    return math.sqrt(float(torch.stack(squares).sum()))


# -- profiles ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SCHEDULES), st.integers(0, 40), st.integers(1, 7))
def test_a_profile_is_what_an_average_of_unit_vectors_is(schedule: Schedule, updates: int, update_every: int) -> None:
    """Where update i has the i-th unit vector for its weights, the average is the profile itself."""
    model = Vector(updates + 1)
    steps = torch.eye(updates + 1, dtype=torch.float64)
    model.weight.data.copy_(steps[0])
    ema = ModelEMA(model, schedule, update_every=update_every)
    for step in steps[1:]:
        model.weight.data.copy_(step)
        ema.update(model)
    profile = profile_weights(schedule, updates, update_every=update_every)
    np.testing.assert_allclose(profile, ema.ema.state_dict()["weight"].numpy(), rtol=1e-12, atol=1e-15)
    assert profile.dtype == np.float64


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SCHEDULES), st.integers(0, 60))
def test_a_profile_is_the_product_of_the_later_decays(schedule: Schedule, updates: int) -> None:
    """Update i counts (1-b_i) times the decays after it; what is left is the start's; together they are 1."""
    decays = [schedule(update) for update in range(1, updates + 1)]
    expected = [math.prod(decays)] + [(1 - b) * math.prod(decays[i:]) for i, b in enumerate(decays, start=1)]
    profile = profile_weights(schedule, updates)
    np.testing.assert_allclose(profile, expected, rtol=1e-12, atol=1e-300)
    assert math.fsum(profile) == pytest.approx(1, rel=1e-12)


def test_a_profile_of_a_million_updates_is_exact() -> None:
    """Of a power function, update i counts (i/n)^(γ+1) - ((i-1)/n)^(γ+1), also after a million updates."""
    updates = 10**6
    shares = np.linspace(0, 1, updates + 1) ** (WIDE.gamma + 1)
    profile = profile_weights(WIDE, updates)
    assert profile[0] == 0
    # An update's own share is one rounded difference from 1, as it is in the average itself.
    np.testing.assert_allclose(profile[1:], np.diff(shares), rtol=1e-9, atol=1e-18)


def test_what_was_forgotten_counts_nothing() -> None:
    """A decay of 0 in between forgets all before it, and what has faded below the smallest number is 0."""

    class Restart:
        def __call__(self, updates: float) -> float:
            return 0.0 if updates == 5 else 0.5

        def describe(self) -> dict[str, Any]:
            return {"name": "restart"}

    profile = profile_weights(Restart(), 7)
    assert profile.tolist() == [0, 0, 0, 0, 0, 0.25, 0.25, 0.5]
    faded = profile_weights(Constant(0.5), 100_000)
    assert faded[:90_000].max() == 0
    assert faded.sum() == 1


@pytest.mark.parametrize(("updates", "update_every"), [(-1, 1), (1, 0)])
def test_a_profile_needs_counts_that_can_be(updates: int, update_every: int) -> None:
    """Counts below their least are refused."""
    with pytest.raises(EmaError, match=f"got {updates} and {update_every}"):
        profile_weights(WIDE, updates, update_every=update_every)


# -- coefficients --------------------------------------------------------------------------------------------------


def combined(snapshots: list[Snapshot], values: tuple[float, ...], updates: int) -> np.ndarray[Any, Any]:
    """The combination of the snapshots' profiles."""
    size = max(updates, *(snapshot.updates for snapshot in snapshots)) + 1
    total = np.zeros(size)
    for snapshot, value in zip(snapshots, values, strict=True):
        profile = profile_weights(snapshot.schedule, snapshot.updates, update_every=snapshot.update_every)
        total[: len(profile)] += value * profile
    return total


some_snapshots = st.lists(
    st.builds(Snapshot, st.sampled_from(SCHEDULES), st.integers(0, 50), st.just(NOTHING), st.just(3)),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=100)
@given(some_snapshots, st.sampled_from(SCHEDULES), st.integers(0, 2**32))
def test_coefficients_are_the_nearest_that_sum_to_1(snapshots: list[Snapshot], target: Schedule, seed: int) -> None:
    """They sum to 1, their error is as they say, and no combination nearby that sums to 1 has a smaller one."""
    updates = max(snapshot.updates for snapshot in snapshots)
    found = coefficients(snapshots, target)
    wanted = profile_weights(target, updates, update_every=3)

    def error(values: tuple[float, ...]) -> float:
        return float(np.linalg.norm(combined(snapshots, values, updates) - wanted) / np.linalg.norm(wanted))

    assert sum(found.values) == pytest.approx(1, abs=1e-9)
    assert found.error == pytest.approx(error(found.values), rel=1e-6, abs=1e-9)
    random = np.random.default_rng(seed)
    for size in (1e-3, 1e-1, 1):
        shift = random.normal(size=len(snapshots)) * size
        assert error(tuple(np.array(found.values) + shift - shift.mean())) >= found.error - 1e-6


def test_long_profiles_are_combined_as_short_ones_are() -> None:
    """Over more updates than are looked at together, with ends anywhere between, the error is still what it says."""
    ends = [1, 777, 32_768, 32_769, 40_000, 70_001]
    snapshots = [Snapshot(schedule, end, NOTHING) for end in ends for schedule in (NARROW, WIDE, Constant(0.9999))]
    found = coefficients(snapshots, PowerFunction.from_sigma_rel(0.08), 65_000)
    wanted = np.zeros(70_002)
    wanted[:65_001] = profile_weights(PowerFunction.from_sigma_rel(0.08), 65_000)
    off = np.linalg.norm(combined(snapshots, found.values, 65_000) - wanted) / np.linalg.norm(wanted)
    assert found.error == pytest.approx(off, rel=1e-9)
    assert found.error < 0.6


def test_memory_does_not_grow_with_the_updates() -> None:
    """240 profiles of 120,000 updates side by side would be 230 MB; they are never in memory together."""
    ends = range(1000, 120_001, 1000)
    snapshots = [Snapshot(schedule, end, NOTHING) for end in ends for schedule in (Constant(0.999), Constant(0.9998))]
    tracemalloc.start()
    try:
        found = coefficients(snapshots, Constant(0.9995))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.error < 0.05
    assert peak < 20e6


@pytest.mark.parametrize("target", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("at", [2000, 1600])
def test_a_tracked_average_is_itself(target: Schedule, at: int) -> None:
    """Where the target is among the snapshots, that one counts 1 and no other counts."""
    snapshots = [Snapshot(schedule, i * 100, NOTHING) for i in range(1, 21) for schedule in (NARROW, WIDE)]
    found = coefficients(snapshots, target, at)
    expected = [float((snapshot.schedule, snapshot.updates) == (target, at)) for snapshot in snapshots]
    assert found.values == pytest.approx(expected, abs=1e-10)
    assert found.error < 1e-10


def test_the_same_snapshot_twice_is_no_trouble() -> None:
    """Two snapshots that cannot be told apart share what one would count."""
    snapshots = [Snapshot(WIDE, 50, NOTHING), Snapshot(WIDE, 100, NOTHING), Snapshot(WIDE, 100, NOTHING)]
    found = coefficients(snapshots, WIDE)
    assert found.values == pytest.approx([0, 0.5, 0.5], abs=1e-10)


# -- synthesis -----------------------------------------------------------------------------------------------------

SYNTHESISED = {"7.5 %": 0.075, "8 %": 0.08}


@dataclass
class Trained:
    """A network that trained for 2,000 updates: its averages at the end, and snapshots of two of them."""

    ema: ModelEMA
    snapshots: list[Snapshot]
    rows: Tensor
    labels: Tensor


@pytest.fixture(scope="module")
def trained() -> Trained:
    """2,000 steps of Adam on real handwritten digits."""
    torch.manual_seed(0)
    data = load_digits()
    rows, labels = torch.from_numpy(data.data / 16).float(), torch.from_numpy(data.target).long()
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    widths = {name: PowerFunction.from_sigma_rel(width) for name, width in SYNTHESISED.items()}
    ema = ModelEMA(model, NARROW, variants={"wide": WIDE, **widths})
    snapshots = []
    for step in range(1, 2001):
        batch = torch.randint(1437, (32,))
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(rows[batch]), labels[batch]))
        optimizer.step()
        ema.update(model)
        if step % 100 == 0:
            snapshots += [Snapshot.of(ema), Snapshot.of(ema, "wide")]
    return Trained(ema, snapshots, rows[1437:], labels[1437:])


@pytest.mark.parametrize("name", SYNTHESISED)
@pytest.mark.parametrize(("every", "limit"), [(100, 2e-3), (200, 2e-2)], ids=["20 snapshots", "10 snapshots"])
def test_training_gives_the_average_that_was_not_tracked(trained: Trained, name: str, every: int, limit: float) -> None:
    """From two widths at 10 or 20 instants, a third is within 2 or 0.2 % of its distance to the nearer of them."""
    snapshots = [snapshot for snapshot in trained.snapshots if snapshot.updates % every == 0]
    tracked = trained.ema.variants[name].state_dict()
    found = synthesize(snapshots, PowerFunction.from_sigma_rel(SYNTHESISED[name]))
    apart = min(distance(other.state_dict(), tracked) for other in (trained.ema.ema, trained.ema.variants["wide"]))
    assert distance(found, tracked) < limit * apart
    assert all(found[each].dtype == tensor.dtype for each, tensor in tracked.items())


@torch.no_grad()
def test_what_was_synthesised_is_a_network_that_works(trained: Trained) -> None:
    """The state loads into the model as it is, and answers as the tracked average does."""
    network, tracked = build_like(trained.ema.ema), trained.ema.variants["8 %"]
    network.load_state_dict(synthesize(trained.snapshots, PowerFunction.from_sigma_rel(0.08)))
    torch.testing.assert_close(network(trained.rows), tracked(trained.rows), rtol=1e-3, atol=1e-3)
    accuracy = (network(trained.rows).argmax(1) == trained.labels).float().mean().item()
    assert accuracy > 0.9


def build_like(module: nn.Module) -> nn.Module:
    """A network of the trained one's layers, with weights of its own."""
    network = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)).eval()
    assert network.state_dict().keys() == module.state_dict().keys()
    return network


CASES = [
    pytest.param(WIDE, NARROW, 25, 1, 0.1, id="narrower than the one tracked"),
    pytest.param(Constant(0.99), Constant(0.98), 10, 1, 0.02, id="constant"),
    pytest.param(Constant(0.98), InverseGamma(0.99), 10, 1, 0.02, id="constant to inverse gamma"),
    pytest.param(ExponentialRamp(0.99, 100.0), WIDE, 20, 1, 0.02, id="ramp to power function"),
    pytest.param(CountRamp(0.99), Scaled(CountRamp(0.99), 2), 20, 1, 0.06, id="the scaled schedule"),
    pytest.param(Constant(0.99), Constant(0.98), 14, 7, 0.02, id="constant, every seventh update"),
    pytest.param(NARROW, WIDE, 20, 10, 0.02, id="power function, every tenth update"),
    pytest.param(NARROW, WIDE, 25, 10, 0.05, id="snapshots between two intervals"),
]


@pytest.mark.parametrize(("tracked", "target", "every", "update_every", "limit"), CASES)
def test_any_schedule_comes_from_any_other(
    tracked: Schedule, target: Schedule, every: int, update_every: int, limit: float
) -> None:
    """One tracked average, looked at often, gives others: nearer to them than the share of the way to it that is named."""
    ema, snapshots = walked(tracked, {"target": target}, updates=1000, every=every, update_every=update_every)
    direct = ema.variants["target"].state_dict()
    found = synthesize(snapshots, target, max_error=1)
    assert distance(found, direct) < limit * distance(ema.ema.state_dict(), direct)


def test_an_earlier_average_can_be_asked_for() -> None:
    """The target may be as of any update before the newest snapshot's."""
    ema, _ = walked(WIDE, {"narrow": NARROW}, updates=700, every=1000)
    _, snapshots = walked(WIDE, {}, updates=1000, every=10)
    found = synthesize(snapshots, NARROW, updates=700)
    direct = ema.variants["narrow"].state_dict()
    assert distance(found, direct) < 0.05 * distance(ema.ema.state_dict(), direct)


@pytest.mark.parametrize("target", [Constant(0.99), WIDE], ids=["constant", "power function"])
def test_a_constant_stays_that_constant(target: Schedule) -> None:
    """However badly the profiles fit, weights that never changed come out as they are."""
    states = {"weight": torch.full((3,), 1234.5)}
    snapshots = [Snapshot(Constant(0.5), 10 * i, states) for i in range(1, 6)]
    found = synthesize(snapshots, target, max_error=math.inf)
    assert torch.equal(found["weight"], states["weight"])


def test_integers_and_excluded_names_are_the_newest() -> None:
    """They come from the newest snapshot up to the target's updates, in whatever order the snapshots are."""

    def state(updates: int) -> dict[str, Tensor]:
        value = float(updates)
        return {"w": torch.tensor(value), "norm.running_var": torch.tensor(value), "steps": torch.tensor(updates)}

    snapshots = [Snapshot(WIDE, updates, state(updates)) for updates in (300, 100, 400, 200)]
    newest = synthesize(snapshots, NARROW, exclude=("*.running_*",), max_error=1)
    assert (newest["steps"].item(), newest["norm.running_var"].item()) == (400, 400)
    assert newest["w"].item() != 400
    earlier = synthesize(snapshots, NARROW, 350, exclude=("*.running_*",), max_error=1)
    assert (earlier["steps"].item(), earlier["norm.running_var"].item()) == (300, 300)
    first = synthesize(snapshots, NARROW, 50, max_error=math.inf)
    assert first["steps"].item() == 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_every_type_is_combined_in_double_precision(dtype: torch.dtype) -> None:
    """The result is the sum in float64, rounded once to the snapshots' own type."""
    torch.manual_seed(0)
    snapshots = [Snapshot(WIDE, i * 10, {"w": torch.randn(50, dtype=dtype)}) for i in range(1, 30)]
    values = coefficients(snapshots, NARROW).values
    wide = torch.promote_types(dtype, torch.float64)
    states = [snapshot.tensors for snapshot in snapshots]
    exact = sum(v * state["w"].to(wide) for v, state in zip(values, states, strict=True) if isinstance(state, Mapping))
    assert isinstance(exact, Tensor)
    found = synthesize(snapshots, NARROW, max_error=1)["w"]
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, exact.to(dtype), rtol=eps, atol=4e-16)
    assert dtype == torch.float64 or (found == exact.to(dtype)).float().mean() > 0.95


def test_states_are_read_one_after_the_other() -> None:
    """A state that is read when needed is let go before the next one is."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read() -> dict[str, Tensor]:
        nonlocal most
        most = max(most, sum(each() is not None for each in alive))
        tensor = torch.ones(4)
        alive.append(weakref.ref(tensor))
        return {"w": tensor}

    synthesize([Snapshot(WIDE, i, read) for i in range(1, 11)], NARROW, max_error=math.inf)
    assert len(alive) == 10
    assert most == 0


def test_a_snapshot_of_an_average_is_a_copy() -> None:
    """It holds what the average or the variant was, and nothing that happens later."""
    torch.manual_seed(0)
    model = Everything()
    ema = ModelEMA(model, WIDE, variants={"narrow": NARROW}, update_every=2)
    for _ in range(4):
        nn.init.normal_(model.encode.weight)
        ema.update(model)
    whole, narrow = Snapshot.of(ema), Snapshot.of(ema, "narrow")
    then = {name: tensor.clone() for name, tensor in ema.ema.state_dict().items()}
    for _ in range(2):
        nn.init.normal_(model.encode.weight)
        ema.update(model)
    assert (whole.schedule, whole.updates, whole.update_every) == (WIDE, 4, 2)
    assert narrow.schedule == NARROW
    assert isinstance(whole.tensors, dict)
    torch.testing.assert_close(whole.tensors, then, rtol=0, atol=0)
    assert not torch.equal(whole.tensors["encode.weight"], ema.ema.state_dict()["encode.weight"])


# -- what is refused -----------------------------------------------------------------------------------------------


def test_nothing_comes_from_nothing() -> None:
    """Without a snapshot there is an error that says so."""
    with pytest.raises(EmaError, match="at least one snapshot"):
        synthesize([], WIDE)


def test_a_target_after_the_newest_snapshot_is_refused() -> None:
    """The future is not a combination of the past; the error has both numbers."""
    with pytest.raises(EmaError, match="at most 200 updates.*got 201"):
        synthesize([Snapshot(WIDE, 100, NOTHING), Snapshot(WIDE, 200, NOTHING)], WIDE, 201)


@pytest.mark.parametrize("updates", [-1, -100])
def test_a_target_before_the_first_update_is_refused(updates: int) -> None:
    """Counts are not negative, of a target or of a snapshot."""
    with pytest.raises(EmaError, match=f"got {updates} and 1"):
        synthesize([Snapshot(WIDE, 100, NOTHING)], WIDE, updates)
    with pytest.raises(EmaError, match=f"got {updates} and 1"):
        synthesize([Snapshot(WIDE, updates, NOTHING)], WIDE, 0)


def test_intervals_are_not_mixed() -> None:
    """Snapshots of averages with different intervals do not combine; the error has the intervals."""
    with pytest.raises(EmaError, match="one update_every, got 1, 10"):
        synthesize([Snapshot(WIDE, 100, NOTHING), Snapshot(WIDE, 200, NOTHING, 10)], WIDE)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        pytest.param({"a": torch.ones(2)}, "missing tensor: b", id="missing"),
        pytest.param(
            {"a": torch.ones(2), "b": torch.ones(1), "c": torch.ones(1)}, "unexpected tensor: c", id="unexpected"
        ),
        pytest.param(
            {"a": torch.ones(3), "b": torch.ones(1)},
            r"wrong shape: a \(expected \[2\], got \[3\]\)",
            id="shape",
        ),
        pytest.param(
            {"a": torch.ones(2).double(), "b": torch.ones(1)},
            r"wrong dtype: a \(expected float32, got float64\)",
            id="dtype",
        ),
    ],
)
def test_snapshots_of_another_model_are_refused(other: dict[str, Tensor], problem: str) -> None:
    """States must have the same names, shapes and types; the error names what differs, and the snapshots."""
    one = {"a": torch.ones(2), "b": torch.ones(1)}
    with pytest.raises(EmaError, match=f"after 200 updates is not like that after 100: {problem}"):
        synthesize([Snapshot(WIDE, 100, one), Snapshot(WIDE, 200, other)], WIDE)


def test_an_empty_state_is_a_state() -> None:
    """A first snapshot without tensors is not like a second one that has some."""
    with pytest.raises(EmaError, match="unexpected tensor: a"):
        synthesize([Snapshot(WIDE, 100, NOTHING), Snapshot(WIDE, 200, {"a": torch.ones(1)})], WIDE)


def test_too_large_an_error_is_refused_before_anything_is_read() -> None:
    """What the snapshots cannot give raises, with the error and what to do; whoever accepts it gets it."""

    def read() -> dict[str, Tensor]:
        raise StoreError("read too early")

    few = [Snapshot(WIDE, 500, read), Snapshot(WIDE, 1000, read)]
    error = coefficients(few, NARROW).error
    assert error > 0.05
    with pytest.raises(
        EmaError, match=re.escape(f"with an error of {error:.3g}, expected at most 0.05: take snapshots")
    ):
        synthesize(few, NARROW)
    state = {"w": torch.ones(1)}
    accepted = [replace(snapshot, tensors=state) for snapshot in few]
    assert synthesize(accepted, NARROW, max_error=error * 1.01)["w"].item() == 1


STATE = {"weight": torch.ones(2)}
GOOD = [Snapshot(Constant(0.5), updates, STATE) for updates in (1, 2, 3)]


def good(**changes: Any) -> Snapshot:
    """A good snapshot, but for these fields."""
    return replace(GOOD[0], **changes)


def test_an_iterator_of_snapshots_will_do() -> None:
    """It is read once."""
    assert synthesize((each for each in GOOD), lambda _: 0.5)["weight"].tolist() == [1.0, 1.0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"snapshots": None}, "expected a list of snapshots, got None"),
        ({"snapshots": [1]}, "expected a list of snapshots"),
        ({"snapshots": GOOD[0]}, "expected a list of snapshots"),
        ({"snapshots": [good(schedule=0.5)]}, "that of a snapshot is a schedule, .* got 0.5"),
        ({"snapshots": [good(updates="1")]}, "both whole, got '1' and 1"),
        ({"snapshots": [good(update_every=None)]}, "both whole, got 1 and None"),
        ({"snapshots": [good(tensors=None)]}, "tensors by name, or a function .* got NoneType"),
        ({"snapshots": [good(tensors={"weight": [1]})]}, "by name, got list under 'weight'"),
        ({"snapshots": [good(tensors={5: torch.ones(1)})]}, "by name, got Tensor under 5"),
        (
            {"snapshots": [good(tensors={"a": torch.eye(2).to_sparse()})]},
            "a in the snapshot after 1 updates",
        ),
        ({"target": 0.5}, "the target is a schedule, such as Constant.*, got 0.5"),
        ({"target": Constant}, "the target is a schedule"),
        ({"updates": 2.5}, "both whole, got 2.5 and 1"),
        ({"exclude": None}, "exclude takes a name or several"),
        ({"exclude": "wieght"}, "exclude='wieght' names nothing: there are weight"),
        ({"max_error": None}, "max_error is a number"),
    ],
    ids=str,
)
def test_what_cannot_be_combined_is_refused_in_words(wrong: dict[str, Any], message: str) -> None:
    """Each argument says what it takes, and what came."""
    arguments: dict[str, Any] = {"snapshots": GOOD, "target": Constant(0.5)} | wrong
    with pytest.raises(EmaError, match=message):
        synthesize(**arguments)


def test_a_snapshot_or_a_profile_of_something_else_is_refused() -> None:
    """A module has no schedule, and a number is none."""
    with pytest.raises(EmaError, match="a snapshot is of a ModelEMA, got Linear"):
        Snapshot.of(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(EmaError, match="what has a profile is a schedule, .* got 0.5"):
        profile_weights(0.5, 3)  # type: ignore[arg-type]


def test_a_snapshot_after_another_decay_was_set_is_refused() -> None:
    """The schedule is that of the later updates only; a function that knows both gives what was averaged."""
    model = Vector(1)
    ema = ModelEMA(model, variants={"slow": Constant(0.9)})
    ema.decay = Constant(0.5)
    for update in range(1, 21):
        if update == 11:
            ema.decay = Constant(0.5)
            Snapshot.of(ema)
            ema.decay = Constant(0.8)
        with torch.no_grad():
            model.weight.fill_(update)
        ema.update(model)
    Snapshot.of(ema, "slow")
    with pytest.raises(EmaError, match=r"set to Constant\(decay=0.8\) after 10 updates"):
        Snapshot.of(ema)
    tensors = {name: tensor.clone() for name, tensor in ema.ema.state_dict().items()}
    profile = profile_weights(lambda update: 0.5 if update <= 10 else 0.8, 20)  # type: ignore[arg-type]
    assert tensors["weight"].item() == pytest.approx(profile @ np.arange(21))


def test_a_snapshot_of_a_variant_that_is_not_there_is_refused() -> None:
    """The error names the variants there are."""
    ema = ModelEMA(Linear(), WIDE, variants={"narrow": NARROW})
    with pytest.raises(EmaError, match="no variant 'wide': there are narrow"):
        Snapshot.of(ema, "wide")


# -- documented ---------------------------------------------------------------------------------------------------------


def test_the_documented_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of docs/averaging.md run as they stand, one after the other."""
    text = (ROOT / "docs/averaging.md").read_text()
    monkeypatch.chdir(tmp_path)
    steps = itertools.count(1)

    def train_step(model: nn.Module, batch: object) -> None:
        torch.manual_seed(next(steps))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))

    model = Linear()
    names = {
        "model": model,
        "architecture": Architecture.of(Linear),
        "inputs": torch.zeros(2, 3),
        "batches": range(400),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "train_step": train_step,
        "validate": lambda model: None,
    }
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)
