"""The moving average of a module's weights.

Knows modules and tensors, and nothing of stores, versions or training loops.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Self, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn

from emaswap.averaging.averaged_module import (
    as_names,
    averaged_module,
    check_device,
    check_named,
    convert,
    reshard,
    unwrap,
)
from emaswap.averaging.following import Following
from emaswap.averaging.plan import Buffers, Plan
from emaswap.averaging.saved import MOST_UPDATES, check_saved, load_all
from emaswap.averaging.schedule import (
    Constant,
    Schedule,
    as_schedule,
    decay_at,
    from_description,
    is_number,
    span_decay,
    window,
)
from emaswap.errors import EmaError

log = logging.getLogger(__name__)

# The modules that have averaged weights just now, whichever average swapped them in.
_SWAPPED: WeakSet[nn.Module] = WeakSet()


class ModelEMA:
    """A moving average of everything in a module's state, kept as a module of its own, ready to evaluate and publish.

    A drop-in for the `ModelEMA` of YOLOv5: the same constructor, `ema`, `updates`, `decay`, `update` and `update_attr`.

    - `ema` is a deep copy of the model, in eval mode, without gradients; half precision is averaged in float32.
    - Floating-point parameters and buffers are averaged, in one fused pass; integer buffers are copied;
      tied tensors are averaged once.
    - Weights that are not finite never enter the average: such an update is left out, and counted in `skipped`. What was
      not finite when the average began, as a mask of −∞ in a buffer, and has not changed since, is left as it is.
    - Wrappers (`DataParallel`, `DistributedDataParallel`, `torch.compile`) are seen through, on either side.
    - A model whose state does not match the average's raises `EmaError` rather than being skipped in silence.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | Schedule | Callable[[float], float] = 0.9999,
        tau: float = 2000,
        updates: int = 0,
        *,
        update_every: int = 1,
        buffers: Buffers = "average",
        exclude: Iterable[str] = (),
        variants: Mapping[str, float | Schedule | Callable[[float], float]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        factory: Callable[[], nn.Module] | None = None,
        guard: bool = True,
    ) -> None:
        """Start the average at the model's present weights.

        Args:
            model: the module that trains; it may be wrapped.
            decay: the final decay of an exponential ramp, any `Schedule`, or a function of the update count.
            tau: updates over which the ramp rises; it has no meaning beside a schedule of your own.
            updates: how many updates the average has already seen, when one goes on.
            update_every: take the weights in at every so many updates only, with the product of their decays.
            buffers: whether floating-point buffers (batch norm's statistics) are averaged or copied.
            exclude: names that are copied instead of averaged, with wildcards: "head.*".
            variants: further averages of the same model by name, each with a schedule of its own, all made in one pass.
            device: where the averages live; by default where the model does.
            dtype: of the averages' floating-point state; by default the model's, and float32 for half precision.
            factory: makes the module to average in, for a model that cannot be deep-copied.
            guard: whether to look for weights that are not finite before they are taken in.

        Raises `EmaError` when the model cannot be copied, the factory makes another one, or `exclude` names nothing in it.
        """
        if buffers not in get_args(Buffers):
            raise EmaError(f"buffers is one of {', '.join(get_args(Buffers))}, got {buffers!r}")
        for name, number, least in (("update_every", update_every, 1), ("updates", updates, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= MOST_UPDATES:
                raise EmaError(f"{name} is an integer of at least {least}, got {number!r} (and at most {MOST_UPDATES})")
        if variants is not None and not isinstance(variants, Mapping):
            raise EmaError(f"variants are schedules by name, got {type(variants).__name__}")
        if variants is not None:
            as_names(variants, "variants")
        if factory is not None and (not callable(factory) or isinstance(factory, nn.Module)):
            raise EmaError(f"factory is a function that makes another module, got {type(factory).__name__}")
        self._decay = as_schedule(decay, tau)
        self.schedules = {name: as_schedule(each, tau) for name, each in (variants or {}).items()}
        model = unwrap(model)
        self.ema = averaged_module(model, device=device, dtype=dtype, factory=factory)
        self.variants = {
            name: averaged_module(model, device=device, dtype=dtype, factory=factory) for name in variants or {}
        }
        self.updates = updates
        self.update_every = update_every
        self.buffers: Buffers = buffers
        self.exclude = as_names(exclude, "exclude")
        check_named(self.exclude, self.ema)
        self.guard = guard
        self._behind = 0
        self._skipped = 0
        self._skipped_on_device: Tensor | None = None
        self._told_of_skipped = False
        self._following: Following | None = None
        self._forgot_optimizer = False
        self._decay_since = 0
        self._swapped = False
        self._plan: Plan | None = None

    @property
    def decay(self) -> Schedule:
        """The schedule of `ema`. It may be set to a schedule, a function of the update count, or a constant decay."""
        return self._decay

    @decay.setter
    def decay(self, decay: float | Schedule | Callable[[float], float]) -> None:
        # A number that is set later is meant from now on: a ramp up to it would begin anew.
        new = Constant(float(decay)) if is_number(decay) else as_schedule(decay)  # type: ignore[arg-type]
        if new != self._decay:
            self._decay_since = self.updates
        self._decay = new

    @property
    def decay_since(self) -> int:
        """The updates before the present schedule was set; 0 where it is that of all. A saved state does not know it."""
        return self._decay_since

    @property
    def module(self) -> nn.Module:
        """The averaged module: another name of `ema`."""
        return self.ema

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the averaged module."""
        return self.ema(*inputs, **named)

    def __repr__(self) -> str:
        described = self.decay.describe()
        parameters = ", ".join(f"{name}={value}" for name, value in described.items() if name != "name")
        with suppress(Exception):  # a function that gives no decay is told of by the next update
            parameters += f", window={window(decay_at(self.decay, self.updates)):.4g}" if self.updates else ""
        parts = [
            type(self.ema).__name__,
            f"{described['name']}({parameters})",
            f"updates={self.updates}",
            *([f"update_every={self.update_every}"] if self.update_every > 1 else []),
            *([f"variants={list(self.variants)}"] if self.variants else []),
        ]
        return f"{type(self).__name__}({', '.join(parts)})"

    def to(self, *to: Any, **options: Any) -> Self:
        """Move the averages to a device, or their floating-point state to a dtype, as `nn.Module.to` takes them.

        The model may be elsewhere: each update then moves its weights. Without a dtype, each tensor keeps its own. Raises
        `EmaError` for a device that is not there, and for a dtype that an average cannot be kept in.
        """
        try:
            device, dtype, _, memory_format = torch._C._nn._parse_to(*to, **options)
        except (TypeError, RuntimeError) as error:
            raise EmaError(f"to() takes a device, a dtype or a tensor that has them: {error}") from error
        check_device(device)
        if device is not None and device.type == "meta":
            raise EmaError("the meta device holds no numbers, so that the average would be lost: name another device")
        for average in (self.ema, *self.variants.values()):
            if dtype is not None:
                convert(average, device, dtype)
            average.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        return self

    @torch.no_grad()
    def update(self, model: nn.Module) -> bool:
        """Take the model's present weights into the average. Call it once an optimizer step.

        Returns whether it did so: not between two intervals, when the weights are not finite, or when a followed
        optimizer made no step. On CUDA the guard works on the device, without waiting: there, an update that it leaves
        out is counted among `updates`, too.

        Raises `EmaError` when the model's state and the average's do not have the same names and shapes. The optimizer's
        step still counts then, once that is mended.
        """
        model = unwrap(model)
        if self._swapped or (_SWAPPED and not _SWAPPED.isdisjoint(model.modules())):
            raise EmaError("update() inside swapped_into(): the model has the averaged weights there, not its own")
        if self._forgot_optimizer:
            self._forgot_optimizer = False
            log.warning("a copy of an average follows no optimizer, so each update counts: call follow() on it, too")
        if self._following is None:
            return self._take_in(model)
        if not self._following.has_stepped(model):
            return False
        try:
            return self._take_in(model)
        except BaseException:
            self._following.give_back()
            raise

    def _take_in(self, model: nn.Module) -> bool:
        plan = self._planned(model)
        if self._behind + 1 < self.update_every:
            self.updates += 1
            self._behind += 1
            return False
        found_inf = plan.found_inf() if self.guard and plan.weights() else None
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item():
            self._plan = None  # the average may have been given a mask since the plan was made
            plan = self._planned(model)
            found_inf = plan.found_inf()
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item():
            self._skipped += 1
            self._tell_of_skipped(plan)
            return False
        now, first = self.updates + 1, self.updates + 1 - self._behind
        weights = [1 - span_decay(schedule, first, now) for schedule in (self.decay, *self.schedules.values())]
        if found_inf is None or found_inf.device.type == "cpu":
            plan.run(weights)
        else:
            plan.run_unless(found_inf, weights)
            self._skipped_on_device = (
                found_inf if self._skipped_on_device is None else self._skipped_on_device + found_inf
            )
        self.updates, self._behind = now, 0
        return True

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Make `update` do nothing unless a followed optimizer has made a step since the last update.

        Neither micro-batches of gradient accumulation nor steps that a `GradScaler` skips are counted then.
        Asking a fused optimizer under a `GradScaler` whether it made its step waits for the device on CUDA.
        Call it again for an optimizer that takes over; until then, a warning says that weights change without a step.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise EmaError(
                f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}; call follow() for each one"
            )
        if self._following is None:
            self._following = Following()
        self._forgot_optimizer = False
        self._following.add(optimizer)

    @property
    def skipped(self) -> int:
        """How many updates were left out because the weights were not finite. On CUDA, reading it waits for the device."""
        found = self._skipped + (0 if self._skipped_on_device is None else int(self._skipped_on_device.item()))
        if found:
            self._tell_of_skipped(self._plan)
        return found

    def _tell_of_skipped(self, plan: Plan | None) -> None:
        """Say once that updates are left out, and because of which weights, where they still are not finite."""
        if self._told_of_skipped:
            return
        self._told_of_skipped = True
        names = plan.not_finite() if plan is not None else []
        named = f" in {', '.join(names[:10])}{f' and {len(names) - 10} more' if names[10:] else ''}" if names else ""
        log.warning(
            "an update was left out of the average, since there are NaNs or infinities%s; such updates are counted in "
            "`skipped`, and this is said once. State that is meant to change so can be named in exclude=",
            named,
        )

    @contextmanager
    def swapped_into(self, model: nn.Module, variant: str | None = None) -> Iterator[None]:
        """Give the model the averaged weights inside the block, and its own again after it, bit for bit, whatever happens.

        For evaluation in place: it takes one more copy of the weights. `variant` names another average than `ema`.
        Raises `EmaError` when blocks are nested, or there is no such variant.
        """
        if self._swapped:
            raise EmaError("swapped_into() inside swapped_into(): the model's own weights are put aside already")
        names = [None, *self.variants]
        if variant not in names:
            raise EmaError(f"no variant {variant!r}: there are {', '.join(self.variants) or 'none'}")
        model = unwrap(model)
        plan = self._planned(model)
        pairs = plan.pairs(names.index(variant))
        own = [weight.clone() for weight, _ in pairs]
        swapped = WeakSet(each for each in model.modules() if each not in _SWAPPED)
        _SWAPPED.update(swapped)
        self._swapped = True
        try:
            with torch.no_grad():
                for weight, average in pairs:
                    weight.copy_(average)
            yield
        finally:
            self._swapped = False
            _SWAPPED.difference_update(swapped)
            if self._following is not None:
                self._following.forget()
            with torch.no_grad():
                reshard(model)
                plan.put_back()
                for (weight, _), before in zip(pairs, own, strict=True):
                    weight.copy_(before)

    def update_attr(
        self,
        model: nn.Module,
        include: Iterable[str] = (),
        exclude: Iterable[str] = ("process_group", "reducer"),
    ) -> None:
        """Copy plain attributes (class names, strides, ...) from the model to the averages.

        With `include`, just those; otherwise every public one that is not in `exclude`. The average's eval mode stays, and
        so do attributes that hold parts of the model, or methods of them. Raises `EmaError` for a name that is no attribute.
        """
        wanted, unwanted = set(as_names(include, "include")), {*as_names(exclude, "exclude"), "training"}
        model = unwrap(model)
        parts = set(map(id, model.modules()))
        if missing := sorted(wanted - vars(model).keys()):
            raise EmaError(f"include names what {type(model).__name__} has no attribute for: {', '.join(missing)}")
        for name, value in vars(model).items():
            if name.startswith("_") or name in unwanted or (wanted and name not in wanted):
                continue
            if _runs(value, parts):  # the average would run the model's weights under its own name
                continue
            for module in (self.ema, *self.variants.values()):
                setattr(module, name, value)

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to resume exactly here: averages, schedules and counts."""
        return {
            "updates": self.updates,
            "behind": self._behind,
            "skipped": self.skipped,
            "update_every": self.update_every,
            "schedule": self.decay.describe(),
            "ema": self.ema.state_dict(),
            "variants": {
                name: {"schedule": self.schedules[name].describe(), "ema": module.state_dict()}
                for name, module in self.variants.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume exactly from what `state_dict` returned: without the count, a ramp would start over and forget the average.

        The saved schedules are taken over, too. A schedule that cannot be made by name, as a function or a class of your
        own, must be given before as it was. Raises `EmaError` when it was not, for a field that is missing or not what it
        should be, and for variants or tensors of another average; nothing has changed then.
        """
        whole = check_saved(state, list(self.variants))
        variants = whole["variants"]
        decay = _restored(self.decay, whole["schedule"])
        schedules = {name: _restored(self.schedules[name], variants[name]["schedule"]) for name in self.schedules}
        load_all(
            [self.ema, *self.variants.values()],
            [whole["ema"], *(variants[name]["ema"] for name in self.variants)],
            finite=self.guard,
        )
        self._decay, self._decay_since, self.schedules = decay, 0, schedules
        self.update_every, self.updates, self._behind = whole["update_every"], whole["updates"], whole["behind"]
        self._skipped, self._skipped_on_device = whole["skipped"], None
        self._plan = None  # what is not finite in the averages may be elsewhere now

    def __getstate__(self) -> dict[str, object]:
        # The plan points into a live model; it is rebuilt at the next update. A followed optimizer does not come along,
        # nor does a model with weights swapped into it.
        forgot = self._forgot_optimizer or self._following is not None
        return {**self.__dict__, "_plan": None, "_following": None, "_forgot_optimizer": forgot, "_swapped": False}

    def _planned(self, model: nn.Module) -> Plan:
        averages = [self.ema, *self.variants.values()]
        if self._plan is None or not self._plan.holds(averages, model):
            for module in (*averages, model):
                reshard(module)
            self._plan = Plan(averages, model, buffers=self.buffers, exclude=self.exclude)
        return self._plan


def _runs(value: object, parts: set[int]) -> bool:
    """Return whether a value is one of these modules (by id), a method of one, or holds some."""
    held: Iterable[object] = [value]
    if isinstance(value, (list, tuple, set, frozenset)):
        held = value
    elif isinstance(value, Mapping):
        held = value.values()
    elif isinstance(value, partial):
        held = [value.func, *value.args, *value.keywords.values()]
    return any(id(getattr(each, "__self__", each)) in parts for each in held)


def _restored(schedule: Schedule, description: Mapping[str, Any]) -> Schedule:
    with suppress(ValueError, RuntimeError):  # arrays and tensors do not say whether they are equal
        if description == schedule.describe():
            return schedule
    try:
        return from_description(description)
    except EmaError as error:
        raise EmaError(
            f"the state's schedule is {dict(description)}, this average's {schedule.describe()}: one that cannot be made by "
            "name must be set before the state is loaded"
        ) from error
