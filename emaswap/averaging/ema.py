"""The moving average of numbers, or of tensors of one shape."""

from collections.abc import Mapping
from numbers import Real
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from emaswap.averaging.schedule import is_number
from emaswap.errors import EmaError

Value = TypeVar("Value", float, Tensor)


class EMA(Generic[Value]):
    """The bias-corrected exponential moving average of numbers, or of tensors of one shape.

    `update(x)` makes average ← α·x + (1−α)·average, from zero; `get()` divides by the weight that the inputs have
    received so far, so a constant input gives just that constant from the first update on. This is the correction of
    Adam (arXiv 1412.6980, section 3) for a decay of 1−α: after n updates the weight is 1 − (1−α)^n. The weight is
    carried along, so `alpha` may change between two updates.

    Tensors of half precision and of integers are averaged in float32: in their own dtype an average would stop moving.
    """

    def __init__(self, alpha: float) -> None:
        """`alpha` in (0, 1] is the weight of the newest input; the average looks back over about 1/alpha of them."""
        self.alpha = alpha
        self.count = 0
        self._weight = 0.0
        self._average: Value | None = None

    @property
    def alpha(self) -> float:
        """The weight of the next input. Setting it raises `EmaError` outside of (0, 1]."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._alpha = _checked_alpha(alpha)

    def update(self, x: Value) -> None:
        """Take one more input into the average. A tensor's gradient history does not come along.

        Raises `EmaError` for what is neither a number nor a tensor, and for a tensor of another shape or device than the
        first.
        """
        x = _averaged(x)
        if self._average is not None:
            _check_alike(self._average, x)
        if self._average is None or self.alpha == 1:
            # With an alpha of 1 nothing of the past counts: not even a NaN, which 0·NaN would keep.
            self._average = self.alpha * x
        else:
            # Not average + α·(x − average): after an outlier that would lose x to rounding.
            self._average = self.alpha * x + (1 - self.alpha) * self._average
        self._weight = self.alpha + (1 - self.alpha) * self._weight
        self.count += 1

    def get(self) -> Value:
        """Return the bias-corrected average. Raises `EmaError` before the first update: there is no average yet."""
        if self._average is None:
            raise EmaError("EMA.get() before any update(): there is no average yet")
        return self._average / self._weight

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to resume exactly here."""
        return {"alpha": self.alpha, "count": self.count, "weight": self._weight, "average": self._average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned. Raises `EmaError` for anything else, and has changed nothing then."""
        names = ["alpha", "count", "weight", "average"]
        if not isinstance(state, Mapping) or state.keys() != set(names):
            found = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise EmaError(f"the state of an EMA has {', '.join(names)}; this one: {found or 'nothing'}")
        alpha, count, weight, average = (state[name] for name in names)
        alpha = _checked_alpha(alpha)
        if type(count) is not int or count < 0:
            raise EmaError(f"the state's count must be a number of updates, got {count!r}")
        if not is_number(weight) or not (0 < weight <= 1 if count else weight == 0):
            raise EmaError(f"the state's weight must be in (0, 1], and 0 before the first update, got {weight!r}")
        if (average is None) != (count == 0):
            raise EmaError(f"the state's average must be there after the first update and only then, got {average!r}")
        if average is not None and not isinstance(average, Tensor) and not is_number(average):
            raise EmaError(f"the state's average must be a number or a tensor, got {type(average).__name__}")
        average = None if average is None else _averaged(average)
        self._alpha, self.count, self._weight, self._average = alpha, count, float(weight), average


def _checked_alpha(alpha: float) -> float:
    if not is_number(alpha) or not 0 < alpha <= 1:
        raise EmaError(f"alpha must be above 0 and at most 1, got {alpha!r}")
    return float(alpha)


def _averaged(x: Value) -> Value:
    """Return an input in the dtype that it is averaged in."""
    if not isinstance(x, Tensor):
        if not is_number(x) and not isinstance(x, bool):
            problem = " that no float can hold" if isinstance(x, Real) else ""
            raise EmaError(f"an EMA averages numbers or tensors, got {type(x).__name__}{problem}")
        return float(x)
    if x.is_quantized or x.is_nested or x.layout is not torch.strided:
        kind = "quantized" if x.is_quantized else "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise EmaError(f"an EMA averages dense tensors, got one that is {kind}: make it dense first")
    if x.is_complex():
        return x.detach().to(torch.promote_types(x.dtype, torch.complex64))
    if x.is_floating_point() and x.dtype.itemsize > 2:
        return x.detach()
    try:
        return x.detach().float()
    except NotImplementedError:
        raise EmaError(f"an EMA averages what torch can compute with, got {x.dtype}: make it float32 first") from None


def _check_alike(average: float | Tensor, x: float | Tensor) -> None:
    kinds = [_described(each) for each in (average, x)]
    if kinds[0] != kinds[1]:
        raise EmaError(f"this EMA averages {kinds[0]}, got {kinds[1]}: make an EMA for each")


def _described(value: float | Tensor) -> str:
    if not isinstance(value, Tensor):
        return "numbers"
    kind = "complex tensors" if value.is_complex() else "tensors"
    return f"{kind} of shape {list(value.shape)} on {value.device}"
