"""The moving average of numbers, or of tensors of one shape."""

import math
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

from emaswap.errors import EmaError

Value = TypeVar("Value", float, Tensor)


class EMA(Generic[Value]):
    """The bias-corrected exponential moving average of numbers, or of tensors of one shape.

    `update(x)` makes average ← α·x + (1−α)·average, from zero; `get()` divides by the weight that the inputs have
    received so far, so a constant input gives just that constant from the first update on. This is the correction of
    Adam (arXiv 1412.6980, section 3) for a decay of 1−α: after n updates the weight is 1 − (1−α)^n.
    """

    def __init__(self, alpha: float) -> None:
        """`alpha` in (0, 1] is the weight of the newest input; the average looks back over about 1/alpha of them."""
        if not 0 < alpha <= 1:
            raise EmaError(f"alpha must be above 0 and at most 1, got {alpha}")
        self.alpha = alpha
        self.count = 0
        self._average: Value | None = None

    def update(self, x: Value) -> None:
        """Take one more input into the average. A tensor's gradient history does not come along."""
        if isinstance(x, Tensor):
            x = x.detach()
        if self._average is None:
            self._average = self.alpha * x
        else:
            # Not average + α·(x − average): after an outlier that would lose x to rounding.
            self._average = self.alpha * x + (1 - self.alpha) * self._average
        self.count += 1

    def get(self) -> Value:
        """The bias-corrected average. Raises `EmaError` before the first update: there is nothing to average yet."""
        if self._average is None:
            raise EmaError("EMA.get() before any update(): there is no average yet")
        if self.alpha == 1:
            return self._average
        # 1 − (1−α)^n, without the cancellation that ruins it for a tiny α.
        weight = -math.expm1(self.count * math.log1p(-self.alpha))
        return self._average / weight

    def state_dict(self) -> dict[str, Any]:
        """The average as it is, to go on with later: see `load_state_dict`."""
        return {"alpha": self.alpha, "count": self.count, "average": self._average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.alpha, self.count, self._average = state["alpha"], state["count"], state["average"]
