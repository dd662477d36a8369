"""States that are odd in ways that would otherwise go by in silence."""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emaswap import EMA, EmaError, ModelEMA, recalibrate


class Views(nn.Module):
    """Two buffers that are views of one piece of memory."""

    def __init__(self, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        memory = torch.ones(4, 4)
        self.register_buffer("first", first(memory))
        self.register_buffer("second", second(memory))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda memory: memory[:3], lambda memory: memory[1:]),
        (lambda memory: memory, lambda memory: memory.t()),
        (lambda memory: memory, lambda memory: memory.view(2, 8)),
        (lambda memory: memory, lambda memory: memory[1, 2]),
        (lambda memory: memory[:, :3], lambda memory: memory[:, 2:]),
        (lambda memory: memory, lambda memory: memory.view(torch.int16)),
    ],
    ids=["rows", "transposed", "reshaped", "one number", "columns", "other dtype"],
)
def test_tensors_that_overlap_are_refused(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> None:
    """What two tensors share would decay twice."""
    with pytest.raises(EmaError, match="(first and second|second and first) share a part of their memory"):
        ModelEMA(model := Views(first, second)).update(model)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda memory: memory[:2], lambda memory: memory[2:]),
        (lambda memory: memory[:, :2], lambda memory: memory[:, 2:]),
        (lambda memory: memory, lambda memory: memory),
        (lambda memory: memory, lambda memory: memory[2:2]),
    ],
    ids=["halves", "columns", "tied", "empty"],
)
def test_tensors_of_one_memory_that_do_not_overlap_are_averaged_once(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> None:
    """Rows or columns of one matrix each decay once, and tied tensors together."""
    model = Views(first, second)
    ema = ModelEMA(model, decay=lambda _: 0.5)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(3.0)
    ema.update(model)
    assert all((buffer == 2.0).all() for buffer in ema.ema.state_dict().values())


def test_another_view_of_the_same_memory_is_noticed() -> None:
    """A weight that was transposed in place keeps its address; the average follows its new numbers."""
    model = nn.Linear(3, 3, bias=False)
    ema = ModelEMA(model, decay=lambda _: 0.0)
    ema.update(model)
    model.weight.data = model.weight.data.t()
    ema.update(model)
    torch.testing.assert_close(ema.ema.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_rows_that_were_cut_off_are_noticed() -> None:
    """A weight of which only the first rows are kept has the same address and strides, and is another."""
    model = nn.Linear(3, 3, bias=False)
    ema = ModelEMA(model)
    ema.update(model)
    model.weight.data = model.weight.data[:2]
    with pytest.raises(EmaError, match=r"wrong shape: weight \(expected \[3, 3\], got \[2, 3\]\)"):
        ema.update(model)


def test_another_view_in_a_block_is_changed_back() -> None:
    """A weight cut down inside `swapped_into` has all its rows again after it."""
    model = nn.Linear(3, 3, bias=False)
    ema, own = ModelEMA(model), model.weight.detach().clone()
    with ema.swapped_into(model):
        model.weight.data = model.weight.data[:2]
    assert torch.equal(model.weight, own)


def one_buffer(tensor: Tensor, *, persistent: bool = True) -> nn.Module:
    """A module with a weight and a buffer."""
    model = nn.Linear(1, 1)
    model.register_buffer("held", tensor, persistent=persistent)
    return model


@pytest.mark.parametrize("persistent", [False, True])
def test_a_buffer_that_becomes_state_or_no_longer_is_some_is_noticed(*, persistent: bool) -> None:
    """The same tensor registered anew is averaged from then on or not at all, and the average must know."""
    model = one_buffer(torch.ones(2), persistent=persistent)
    ema = ModelEMA(model)
    ema.update(model)
    model.register_buffer("held", model.held, persistent=not persistent)  # type: ignore[arg-type]
    with pytest.raises(EmaError, match=f"{'missing' if persistent else 'unexpected'} tensor: held"):
        ema.update(model)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (torch.ones(2), torch.ones(2) * 1j, r"held \(expected float32, got complex64\)"),
        (torch.ones(2), torch.ones(2, dtype=torch.int64), r"held \(expected float32, got int64\)"),
        (torch.tensor([1, 2]), torch.tensor([1.5, 2.5]), r"held \(expected int64, got float32\)"),
        (torch.tensor([1, 2], dtype=torch.int8), torch.tensor([300, 2]), r"held \(expected int8, got int64\)"),
        (torch.ones(2), torch.ones(2).to_sparse(), "held cannot be averaged: its layout is sparse_coo"),
        (torch.ones(2), torch.ones(2, device="meta"), "held is on the meta device"),
        (torch.ones(2), torch.ones(1).expand(2), "held cannot be averaged: several of its numbers share memory"),
    ],
    ids=["complex", "integer", "a float", "a wider integer", "sparse", "meta", "expanded"],
)
def test_a_buffer_that_becomes_of_another_kind_is_an_error(before: Tensor, after: Tensor, message: str) -> None:
    """Its imaginary part, its fraction or its upper half would be dropped."""
    model = one_buffer(before)
    ema = ModelEMA(model)
    ema.update(model)
    model.held = after
    with pytest.raises(EmaError, match=message):
        ema.update(model)


def test_names_that_a_hook_changes_are_excluded_as_the_module_has_them() -> None:
    """A hook renames what `state_dict()` returns; the average goes by the module's own names, and says so."""

    def rename(_: nn.Module, state: dict[str, Any], *__: object) -> None:
        state["kopf"] = state.pop("held")

    model = one_buffer(torch.ones(2))
    model.register_state_dict_post_hook(rename)  # type: ignore[no-untyped-call]
    with pytest.raises(EmaError, match=r"exclude='kopf' names nothing that is averaged: there are .*held"):
        ModelEMA(model, exclude="kopf")
    ema = ModelEMA(model, decay=lambda _: 1.0, exclude="held")
    model.held = torch.full((2,), 5.0)
    ema.update(model)
    assert torch.equal(ema.ema.held, model.held)  # type: ignore[arg-type]


def test_a_saved_state_with_nans_is_refused() -> None:
    """NaNs would stay for ever; without the guard, which is against them, they are loaded."""
    model = nn.Linear(2, 2)
    ema = ModelEMA(model)
    state = ema.state_dict()
    state["ema"] = {name: torch.full_like(value, torch.nan) for name, value in state["ema"].items()}
    with pytest.raises(EmaError, match=r"the saved state has NaNs in weight, bias"):
        ema.load_state_dict(state)
    assert all(value.isfinite().all() for value in ema.ema.state_dict().values())
    unguarded = ModelEMA(model, guard=False)
    unguarded.load_state_dict(state)
    assert all(value.isnan().all() for value in unguarded.ema.state_dict().values())


def test_an_update_that_fails_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory runs out in an update, the count says what the average has."""
    model = nn.Linear(2, 2)
    ema = ModelEMA(model)

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_lerp_", fail)
        with pytest.raises(MemoryError):
            ema.update(model)
    assert ema.updates == 0
    assert ema.update(model)
    assert ema.updates == 1


def test_methods_of_the_model_do_not_come_along_as_attributes() -> None:
    """A forward that was replaced on the model would run the model's weights under the average's name."""
    model = nn.Linear(2, 2)
    ema = ModelEMA(model)
    model.forward = MethodType(lambda self, rows: nn.functional.linear(rows, self.weight), model)  # type: ignore[method-assign]
    model.note = "new"  # type: ignore[assignment]
    ema.update_attr(model)
    model.parts = [model]  # type: ignore[assignment]
    model.calls = {"call": partial(model.forward)}["call"]  # type: ignore[assignment]
    model.child = nn.Module()
    model.child.note, model.by_child = "child", model.child.parameters  # type: ignore[assignment]
    ema.update_attr(model)
    assert not {"parts", "calls", "by_child"} & vars(ema.ema).keys()
    assert ema.ema.note == "new"
    model.note = "newer"  # type: ignore[assignment]
    ema.update_attr(model, exclude="note")
    assert ema.ema.note == "new"
    ema.update_attr(model, include="note")
    assert ema.ema.note == "newer"
    with pytest.raises(EmaError, match="include takes a name or several, got None"):
        ema.update_attr(model, include=None)  # type: ignore[arg-type]
    assert "forward" not in vars(ema.ema)
    with pytest.raises(EmaError, match="include names what Linear has no attribute for: note_s"):
        ema.update_attr(model, include=("note_s",))


def test_a_batch_norm_that_does_not_run_keeps_its_statistics() -> None:
    """A head for training only would otherwise go back to mean 0 and variance 1."""

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, rows: Tensor) -> Any:
            return self.used(rows)

    module = TwoHeads()
    for norm in (module.used, module.unused):
        norm.running_mean.fill_(7.0)  # type: ignore[union-attr]
    recalibrate(module, [torch.ones(4, 2)])
    assert module.used.running_mean.tolist() == [1.0, 1.0]  # type: ignore[union-attr]
    assert module.unused.running_mean.tolist() == [7.0, 7.0]  # type: ignore[union-attr]


def test_scripted_batch_norm_is_refused() -> None:
    """TorchScript does not let its statistics be set: said so, rather than left as they are."""
    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(2)))
    with pytest.raises(EmaError, match="is scripted"):
        recalibrate(scripted, [torch.ones(4, 2)])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [lambda: torch.ones(2).to_sparse(), lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), lambda: torch.nested.nested_tensor([torch.ones(2)])], ids=["sparse", "quantized", "nested"])  # fmt: skip
def test_an_ema_of_what_is_not_dense_is_refused(make: Callable[[], Tensor]) -> None:
    """In words, rather than by what torch raises in the middle."""
    with pytest.raises(EmaError, match="an EMA averages dense tensors"):
        EMA[Tensor](0.1).update(make())


@pytest.mark.parametrize("decay", [10**400, -(10**400)])
def test_a_number_that_no_float_can_hold_is_refused(decay: int) -> None:
    """As any other decay that is none."""
    with pytest.raises(EmaError):
        ModelEMA(nn.Linear(2, 2), decay=decay)
    with pytest.raises(EmaError):
        EMA(decay)
