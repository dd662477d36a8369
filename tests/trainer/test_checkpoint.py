"""Training checkpoints: what was saved is what is loaded, to the last bit, or an error that says why not."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from emaswap import EmaswapError
from tests.disk import fill, small_disk
from trainer import checkpoint


def saved(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state after it went through a file."""
    checkpoint.save(folder, 1, state)
    loaded = checkpoint.load(folder)
    assert loaded is not None
    return loaded


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder."""
    return sorted(int(path.name.removeprefix("step-").partition(".")[0]) for path in folder.glob("step-*"))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def identical(one: Any, other: Any) -> bool:
    """Whether two states are of the same types and values through and through, NaN and signed zeros included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return same and torch.equal(_bits(one), _bits(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(identical, one, other))
    return repr(one) == repr(other)


# -- what goes in comes out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -1,
        2**200,
        0.1 + 0.2,
        5e-324,
        -0.0,
        math.nan,
        math.inf,
        "",
        "Grüße \N{SNOWMAN}\n\x00",
        [],
        (),
        {},
        [1, (2, [3, (4,)])],
        {1: "one", "1": "text", -5: None, None: 3},
        {"tensor": "a", "mapping": [], "tuple": (), "list": {"tensor": 1}},
        ((), [], {}, ((),)),
    ],
    ids=repr,
)
def test_values_come_back_as_they_were(tmp_path: Path, value: object) -> None:
    """Numbers exact, tuples as tuples, lists as lists, and mappings with keys that are not text."""
    assert identical(saved(tmp_path, {"value": value}), {"value": value})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.empty(0, 3),
        torch.randn(3, 4).t(),
        torch.randn(6)[::2],
        torch.tensor([math.nan, math.inf, -0.0]),
        torch.randn(2, 2).bfloat16(),
        torch.randn(2, 2).half(),
        torch.randn(2, 2).double(),
        torch.tensor([True, False]),
        torch.tensor([0, 255], dtype=torch.uint8),
        torch.tensor([-128, 127], dtype=torch.int8),
        torch.tensor([-(2**15)], dtype=torch.int16),
        torch.tensor([2**31 - 1], dtype=torch.int32),
        torch.tensor([2**63 - 1]),
        torch.randn(2, dtype=torch.complex64),
        torch.ones(2, 3).expand(4, 2, 3),
    ],
    ids=[
        "scalar", "empty", "transposed", "every second", "nan", "bfloat16", "float16", "float64", "bool", "uint8",
        "int8", "int16", "int32", "int64", "complex64", "expanded",
    ],
)  # fmt: skip
def test_tensors_come_back_as_they_were(tmp_path: Path, tensor: Tensor) -> None:
    """Every dtype, every shape and any strides, to the last bit."""
    assert identical(saved(tmp_path, {"a": tensor, "b": [tensor]}), {"a": tensor, "b": [tensor]})


@pytest.mark.parametrize(
    "state",
    [
        {"a": {1: torch.zeros(1), "1": torch.ones(1)}},
        {"a": {"b/c": torch.zeros(1), "b": {"c": torch.ones(1)}}},
        {"a": [torch.zeros(1)], "a/0": torch.ones(1)},
        {"": torch.zeros(1), "/": torch.ones(1)},
    ],
    ids=["number and text", "slash in a key", "slash and a list", "empty key"],
)
def test_tensors_under_keys_that_look_alike_are_kept_apart(tmp_path: Path, state: dict[str, Any]) -> None:
    """No tensor takes another's place, whatever the keys on the way to it are made of."""
    assert identical(saved(tmp_path, state), state)


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"))
_TENSORS = st.lists(st.integers(-5, 5), max_size=3).map(torch.tensor)
_KEYS = st.none() | st.integers() | st.text(st.characters(codec="utf-8"))
_STATES = st.recursive(
    _LEAVES | _TENSORS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(_KEYS, inner),
    max_leaves=12,
)


@given(state=st.dictionaries(st.text(st.characters(codec="utf-8")), _STATES, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_nesting_comes_back_as_it_was(tmp_path: Path, state: dict[str, Any]) -> None:
    """Whatever is nested in whatever, the loaded state is the saved one."""
    for old in tmp_path.iterdir():
        old.unlink()
    assert identical(saved(tmp_path, state), state)


def test_an_optimizer_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """A model and an AdamW that were saved and loaded into fresh ones take the same steps, to the last bit."""

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    model, optimizer = made()
    step(model, optimizer)
    loaded = saved(tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, other_optimizer = made()
    other.load_state_dict(loaded["model"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    for _ in range(3):
        step(model, optimizer)
        step(other, other_optimizer)
    assert identical(dict(model.state_dict()), dict(other.state_dict()))
    assert identical(optimizer.state_dict(), other_optimizer.state_dict())


def test_a_loaded_state_is_independent_of_its_file(tmp_path: Path) -> None:
    """Changing a loaded tensor in place changes neither the file nor the tensor beside it."""
    state = {"a": torch.zeros(3), "b": torch.zeros(3)}
    loaded = saved(tmp_path, state)
    loaded["a"].add_(1)
    assert torch.equal(loaded["b"], state["b"])
    assert identical(checkpoint.load(tmp_path), state)


# -- the file ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    """Everything in it is a tensor's bytes or JSON: another program reads it, and there is no room for a pickle."""
    path = checkpoint.save(tmp_path, 7, {"step": 7, "weights": {"a": torch.arange(6.0)}, "betas": (0.9, 0.999)})
    with safe_open(path, framework="pt") as file:
        packed = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert "betas" in json.dumps(packed)
    assert [tensor.tolist() for tensor in tensors.values()] == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + 6 * 4


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"bytes", len, 1j], ids=["object", "set", "bytes", "code", "complex"]
)
def test_what_a_checkpoint_cannot_hold_is_refused_with_its_place(tmp_path: Path, value: object) -> None:
    """What is neither tensor nor JSON is an error that names where it is, instead of being pickled."""
    with pytest.raises(EmaswapError, match=f"/parts/0/thing, a {type(value).__name__}"):
        checkpoint.save(tmp_path, 1, {"parts": [{"thing": value}]})
    assert checkpoint.load(tmp_path) is None


def test_a_key_that_a_checkpoint_cannot_hold_is_refused(tmp_path: Path) -> None:
    """A key that would not come back as it was is an error when it is saved, not when it is loaded."""
    with pytest.raises(EmaswapError, match="tuple"):
        checkpoint.save(tmp_path, 1, {"parts": {(1, 2): 3}})


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    """Older checkpoints go, the newest and the one before it stay, and other people's files are left alone."""
    (tmp_path / "notes.txt").write_text("mine")
    for step in (10, 20, 30, 40):
        path = checkpoint.save(tmp_path, step, {"step": step})
        assert path.is_file()
    assert steps(tmp_path) == [30, 40]
    assert checkpoint.load(tmp_path) == {"step": 40}
    assert (tmp_path / "notes.txt").exists()


def test_a_checkpoint_that_was_just_saved_is_kept_beside_later_ones(tmp_path: Path) -> None:
    """A run that went back and saves an earlier step does not lose what it has just saved."""
    for step in (40, 60):
        checkpoint.save(tmp_path, step, {"step": step})
    path = checkpoint.save(tmp_path, 45, {"step": 45})
    assert path.is_file()
    assert steps(tmp_path) == [45, 60]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    """A step that needs more digits than usual is newer than one that does not."""
    for step in (99_999_999, 100_000_000):
        checkpoint.save(tmp_path, step, {"step": step})
    assert checkpoint.load(tmp_path) == {"step": 100_000_000}


@pytest.mark.parametrize("make", [False, True], ids=["no folder", "empty folder"])
def test_without_a_checkpoint_there_is_nothing_to_load(tmp_path: Path, *, make: bool) -> None:
    """A run that starts for the first time finds nothing, which is no error."""
    folder = tmp_path / "checkpoints"
    if make:
        folder.mkdir()
    assert checkpoint.load(folder) is None


# -- damage --------------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    """Do to a file what disks and crashes do."""
    data = bytearray(path.read_bytes())
    if how == "flipped bit":
        data[len(data) // 2] ^= 1
    elif how == "cut short":
        data = data[:-1]
    elif how == "longer":
        data += b"x"
    elif how == "zeros":
        data = bytearray(len(data))
    else:
        data.clear()
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flipped bit", "cut short", "longer", "zeros", "empty"])
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The one before it is taken instead, and a warning names the damaged file."""
    checkpoint.save(tmp_path, 10, {"step": 10, "a": torch.ones(5)})
    newest = checkpoint.save(tmp_path, 20, {"step": 20, "a": torch.ones(5)})
    damage(newest, how)
    with caplog.at_level(logging.WARNING):
        loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 10
    assert newest.name in caplog.text


def test_when_all_are_damaged_that_is_an_error(tmp_path: Path) -> None:
    """Starting over in silence would lose the run, so the error says what to do instead."""
    for step in (10, 20):
        damage(checkpoint.save(tmp_path, step, {"step": step}), "flipped bit")
    with pytest.raises(EmaswapError, match="remove them to start over"):
        checkpoint.load(tmp_path)


def test_an_unfinished_file_is_not_loaded_and_is_cleared(tmp_path: Path) -> None:
    """What a killed run was just writing does not count, and goes with the next checkpoint."""
    checkpoint.save(tmp_path, 10, {"step": 10})
    (tmp_path / f"{'0123456789abcdef' * 2}.part").write_bytes(b"half")
    assert checkpoint.load(tmp_path) == {"step": 10}
    checkpoint.save(tmp_path, 20, {"step": 20})
    assert list(tmp_path.glob("*.part")) == []


def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before(tmp_path: Path) -> None:
    """On a full disk saving fails, the older checkpoints are whole, and nothing unfinished remains."""
    with small_disk(tmp_path / "disk", "128k") as disk:
        for step in (10, 20):
            checkpoint.save(disk, step, {"step": step})
        fill(disk)
        with pytest.raises((OSError, EmaswapError)):
            checkpoint.save(disk, 30, {"step": 30, "a": torch.ones(20_000)})
        assert steps(disk) == [10, 20]
        assert list(disk.glob("*.part")) == []
        assert checkpoint.load(disk) == {"step": 20}


def test_a_full_disk_is_an_error_that_says_what_could_not_be_saved(tmp_path: Path) -> None:
    """The error is one of ours, and names the problem and the folder."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        fill(disk)
        with pytest.raises(EmaswapError, match=f"{disk}.*No space left on device"):
            checkpoint.save(disk, 30, {"step": 30})
