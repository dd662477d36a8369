"""Exponential moving averages: of a module's weights (`ModelEMA`), and of numbers or tensors (`EMA`).

Knows modules and tensors, and nothing of stores, versions or training loops.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from emaswap.errors import EmaError
from emaswap.schedule import ExponentialRamp, Schedule

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


class ModelEMA:
    """A moving average of everything in a module's state, kept as a module of its own, ready to evaluate and publish.

    A drop-in for the `ModelEMA` of YOLOv5: the same constructor, `ema`, `updates`, `decay`, `update` and `update_attr`.

    - `ema` is a deep copy of the model, in eval mode, without gradients.
    - Floating-point parameters and buffers are averaged, in one fused pass; integer buffers are copied;
      tied tensors are averaged once.
    - Wrappers (`DataParallel`, `DistributedDataParallel`, `torch.compile`) are seen through, on either side.
    - A model whose state does not match the average's raises `EmaError` rather than being skipped in silence.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | Schedule = 0.9999,
        tau: float = 2000,
        updates: int = 0,
    ) -> None:
        """Start the average at the model's present weights.

        Args:
            model: the module that trains; it may be wrapped.
            decay: the final decay of an exponential ramp, or any `Schedule`.
            tau: updates over which the ramp rises; it has no meaning beside a schedule of your own.
            updates: how many updates the average has already seen, when one goes on.
        """
        self.ema = copy.deepcopy(unwrap(model)).eval()
        self.ema.requires_grad_(False)
        self.updates = updates
        self.decay: Schedule = decay if callable(decay) else ExponentialRamp(decay, tau)
        self._plan: _Plan | None = None

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights into the average. Call it once an optimizer step.

        Raises `EmaError` when the model's state and the average's do not have the same names and shapes.
        """
        model = unwrap(model)
        if self._plan is None or not self._plan.holds(self.ema, model):
            self._plan = _Plan(self.ema, model)
        self.updates += 1
        self._plan.run(1 - self.decay(self.updates))

    def update_attr(
        self,
        model: nn.Module,
        include: Iterable[str] = (),
        exclude: Iterable[str] = ("process_group", "reducer"),
    ) -> None:
        """Copy plain attributes (class names, strides, ...) from the model to the average.

        With `include`, just those; otherwise every public one that is not in `exclude`. The average's eval mode stays.
        """
        wanted, unwanted = set(include), {*exclude, "training"}
        for name, value in vars(unwrap(model)).items():
            if name.startswith("_") or name in unwanted or (wanted and name not in wanted):
                continue
            setattr(self.ema, name, value)

    def state_dict(self) -> dict[str, Any]:
        """The averaged state and the update count, to go on with later: see `load_state_dict`."""
        return {"updates": self.updates, "ema": self.ema.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; without the count, the ramp would start over and forget the average."""
        self.ema.load_state_dict(state["ema"])
        self.updates = state["updates"]

    def __getstate__(self) -> dict[str, object]:
        # The plan points into a live model; it is rebuilt at the next update.
        return {**self.__dict__, "_plan": None}


class _Plan:
    """Which tensor of the average follows which tensor of the model: worked out once, good until either side changes."""

    def __init__(self, ema: nn.Module, model: nn.Module) -> None:
        self._sources = _owners(ema), _owners(model)
        averages, weights = (_by_name(owners) for owners in self._sources)
        if problem := _difference(averages, weights):
            raise EmaError(f"the model is not the one that is being averaged: {problem}")

        done: set[int] = set()
        self._fused: tuple[list[Tensor], list[Tensor]] = [], []
        self._converted: list[tuple[Tensor, Tensor]] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        for name, average in averages.items():
            if id(average) in done:
                continue  # a tied tensor has several names and must decay once
            done.add(id(average))
            weight = weights[name]
            if not (average.is_floating_point() or average.is_complex()):
                self._copied.append((average, weight))
            elif (average.dtype, average.device) != (weight.dtype, weight.device):
                self._converted.append((average, weight))
            else:
                self._fused[0].append(average)
                self._fused[1].append(weight)

    def holds(self, ema: nn.Module, model: nn.Module) -> bool:
        """Whether both modules still hold the very tensors this plan was made for."""
        return all(
            len(was) == len(now) and all(map(_Owner.is_still, was, now))
            for was, now in zip(self._sources, (_owners(ema), _owners(model)), strict=True)
        )

    def run(self, weight: float) -> None:
        """average ← average + weight·(model − average), and the integer buffers as they are."""
        if self._fused[0]:
            torch._foreach_lerp_(*self._fused, weight)
        for average, now in self._converted:
            average.lerp_(now.to(average), weight)
        for average, now in self._copied:
            average.copy_(now)


class _Owner(NamedTuple):
    """A tensor under one of its names, and what `module.to(...)` changes without making another parameter of it."""

    name: str
    tensor: Tensor
    kind: tuple[torch.dtype, torch.device, torch.Size]

    def is_still(self, now: "_Owner") -> bool:
        return self.tensor is now.tensor and self.kind == now.kind


def _owners(module: nn.Module) -> list[_Owner]:
    """Every tensor of the module's state under each of its names; non-persistent buffers are no state."""
    return [
        _Owner(f"{prefix}.{name}" if prefix else name, tensor, (tensor.dtype, tensor.device, tensor.shape))
        for prefix, child in module.named_modules(remove_duplicate=False)
        for held, skipped in ((child._parameters, ()), (child._buffers, child._non_persistent_buffers_set))
        for name, tensor in held.items()
        if tensor is not None and name not in skipped
    ]


def _by_name(owners: list[_Owner]) -> dict[str, Tensor]:
    return {owner.name.replace("_orig_mod.", ""): owner.tensor for owner in owners}


def _difference(averages: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """What keeps two states from matching, in words; empty when they match."""
    problems = {
        "only in the average": sorted(averages.keys() - weights.keys()),
        "only in the model": sorted(weights.keys() - averages.keys()),
        "of another shape": [
            f"{name} {list(weights[name].shape)}, averaged as {list(average.shape)}"
            for name, average in averages.items()
            if name in weights and weights[name].shape != average.shape
        ],
    }
    return "; ".join(
        f"{what}: {', '.join(names[:5])}{' ...' if names[5:] else ''}" for what, names in problems.items() if names
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `DataParallel`, `DistributedDataParallel` and `torch.compile`, however nested."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model
