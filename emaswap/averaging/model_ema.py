"""The moving average of a module's weights.

Knows modules and tensors, and nothing of stores, versions or training loops.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from emaswap.averaging.plan import Buffers, Plan
from emaswap.averaging.schedule import ExponentialRamp, Schedule, from_description, span_decay
from emaswap.errors import EmaError
from emaswap.tensors import plain_name


class ModelEMA:
    """A moving average of everything in a module's state, kept as a module of its own, ready to evaluate and publish.

    A drop-in for the `ModelEMA` of YOLOv5: the same constructor, `ema`, `updates`, `decay`, `update` and `update_attr`.

    - `ema` is a deep copy of the model, in eval mode, without gradients; half precision is averaged in float32.
    - Floating-point parameters and buffers are averaged, in one fused pass; integer buffers are copied;
      tied tensors are averaged once.
    - Weights that are not finite never enter the average: such an update is left out, and counted in `skipped`.
    - Wrappers (`DataParallel`, `DistributedDataParallel`, `torch.compile`) are seen through, on either side.
    - A model whose state does not match the average's raises `EmaError` rather than being skipped in silence.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | Schedule = 0.9999,
        tau: float = 2000,
        updates: int = 0,
        *,
        update_every: int = 1,
        buffers: Buffers = "average",
        exclude: Iterable[str] = (),
        variants: Mapping[str, Schedule] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        factory: Callable[[], nn.Module] | None = None,
        guard: bool = True,
    ) -> None:
        """Start the average at the model's present weights.

        Args:
            model: the module that trains; it may be wrapped.
            decay: the final decay of an exponential ramp, or any `Schedule`.
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
        if update_every < 1:
            raise EmaError(f"update_every is at least 1, got {update_every}")
        model = unwrap(model)
        self.ema = _average_of(model, device=device, dtype=dtype, factory=factory)
        self.variants = {
            name: _average_of(model, device=device, dtype=dtype, factory=factory) for name in variants or {}
        }
        self.updates = updates
        self.decay: Schedule = decay if callable(decay) else ExponentialRamp(decay, tau)
        self.schedules = dict(variants or {})
        self.update_every = update_every
        self.buffers: Buffers = buffers
        self.exclude = tuple(exclude)
        _check_named(self.exclude, self.ema)
        self.guard = guard
        self._behind = 0
        self._skipped = 0
        self._skipped_on_device: Tensor | None = None
        self._stepped: bool | None = None
        self._swapped = False
        self._plan: Plan | None = None

    @torch.no_grad()
    def update(self, model: nn.Module) -> bool:
        """Take the model's present weights into the average. Call it once an optimizer step.

        Returns whether it did so: not between two intervals, when the weights are not finite, or when a followed
        optimizer made no step. On CUDA the guard works on the device, without waiting: there, an update that it leaves
        out is counted among `updates`, too.

        Raises `EmaError` when the model's state and the average's do not have the same names and shapes.
        """
        if self._swapped:
            raise EmaError("update() inside swapped_into(): the model has the averaged weights there, not its own")
        if self._stepped is False:
            return False
        plan = self._planned(unwrap(model))
        self._stepped = None if self._stepped is None else False
        if self._behind + 1 < self.update_every:
            self.updates += 1
            self._behind += 1
            return False
        found_inf = plan.found_inf() if self.guard and plan.weights() else None
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item():
            self._skipped += 1
            return False
        self.updates += 1
        first = self.updates - self._behind
        self._behind = 0
        weights = [1 - span_decay(schedule, first, self.updates) for schedule in (self.decay, *self.schedules.values())]
        if found_inf is None or found_inf.device.type == "cpu":
            plan.run(weights)
        else:
            plan.run_unless(found_inf, weights)
            self._skipped_on_device = (
                found_inf if self._skipped_on_device is None else self._skipped_on_device + found_inf
            )
        return True

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on, `update` does nothing unless this optimizer made a step since the last one.

        So neither the micro-batches of gradient accumulation nor a step that a `GradScaler` leaves out are counted.
        A fused optimizer under a `GradScaler` is asked whether it made its step, which on CUDA waits for the device.
        """
        self._stepped = False

        def stepped(optimizer: torch.optim.Optimizer, *_: object) -> None:
            # GradScaler hands a fused optimizer its flag, and leaves it to that to leave the step out.
            found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
            if found_inf is None or not found_inf.item():
                self._stepped = True

        optimizer.register_step_post_hook(stepped)

    @property
    def skipped(self) -> int:
        """How many updates were left out because the weights were not finite. On CUDA, reading it waits for the device."""
        return self._skipped + (0 if self._skipped_on_device is None else int(self._skipped_on_device.item()))

    @contextmanager
    def swapped_into(self, model: nn.Module, variant: str | None = None) -> Iterator[None]:
        """Inside the block the model has the averaged weights; after it, whatever happens, its own again, bit for bit.

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
        self._swapped = True
        try:
            with torch.no_grad():
                for weight, average in pairs:
                    weight.copy_(average)
            yield
        finally:
            with torch.no_grad():
                _reshard(model)
                plan.put_back()
                for (weight, _), before in zip(pairs, own, strict=True):
                    weight.copy_(before)
            self._swapped = False

    def update_attr(
        self,
        model: nn.Module,
        include: Iterable[str] = (),
        exclude: Iterable[str] = ("process_group", "reducer"),
    ) -> None:
        """Copy plain attributes (class names, strides, ...) from the model to the averages.

        With `include`, just those; otherwise every public one that is not in `exclude`. The average's eval mode stays.
        """
        wanted, unwanted = set(include), {*exclude, "training"}
        for name, value in vars(unwrap(model)).items():
            if name.startswith("_") or name in unwanted or (wanted and name not in wanted):
                continue
            for module in (self.ema, *self.variants.values()):
                setattr(module, name, value)

    def state_dict(self) -> dict[str, Any]:
        """The averaged states, the schedules and the counts, to go on with later: see `load_state_dict`."""
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
        """Go on exactly from what `state_dict` returned: without the count, a ramp would start over and forget the average.

        The saved schedules are taken over, too. A schedule class of your own, which cannot be made by name, must be
        given at construction as it was. Raises `EmaError` when it was not, or when the variants or the tensors are
        others; nothing has changed then.
        """
        variants = state.get("variants", {})
        if variants.keys() != self.variants.keys():
            raise EmaError(f"the state has the variants {sorted(variants)}, this average {sorted(self.variants)}")
        decay = _restored(self.decay, state.get("schedule"))
        schedules = {name: _restored(self.schedules[name], saved["schedule"]) for name, saved in variants.items()}
        _load_all(
            [self.ema, *(self.variants[name] for name in variants)],
            [state["ema"], *(saved["ema"] for saved in variants.values())],
        )
        self.decay, self.schedules = decay, schedules
        self.update_every = state.get("update_every", self.update_every)
        self.updates, self._behind = state["updates"], state.get("behind", 0)
        self._skipped, self._skipped_on_device = state.get("skipped", 0), None

    def __getstate__(self) -> dict[str, object]:
        # The plan points into a live model; it is rebuilt at the next update. A followed optimizer does not come along,
        # nor does a model with weights swapped into it.
        return {**self.__dict__, "_plan": None, "_stepped": None, "_swapped": False}

    def _planned(self, model: nn.Module) -> Plan:
        averages = [self.ema, *self.variants.values()]
        if self._plan is None or not self._plan.holds(averages, model):
            for module in (*averages, model):
                _reshard(module)
            self._plan = Plan(averages, model, buffers=self.buffers, exclude=self.exclude)
        return self._plan


def _average_of(
    model: nn.Module,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    factory: Callable[[], nn.Module] | None,
) -> nn.Module:
    """A module like the model, with its present state, to average in."""
    if factory is None:
        try:
            average = copy.deepcopy(model)
        except Exception as error:  # whatever keeps a module from being copied, the way out is the same
            raise EmaError(
                f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error}): "
                "give ModelEMA(..., factory=...) that makes another one"
            ) from error
    else:
        average = unwrap(factory())
        _reshard(model)
        with torch.no_grad():
            for weight, initial in Plan([average], model, buffers="copy", exclude=()).pairs(0):
                initial.copy_(weight)
    average.eval().requires_grad_(False)
    average._apply(lambda tensor: tensor.to(device, _averaged_dtype(tensor, dtype)))  # type: ignore[no-untyped-call]
    return average


def _averaged_dtype(tensor: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """float32 for half precision: at a decay of 0.9999, bfloat16 has too few digits to move at all."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return wanted or (torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype)


def _reshard(module: nn.Module) -> None:
    """Let FSDP2 give up weights that it has gathered for a forward pass, and go back to the shards they came from."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return  # where it was not imported, nothing is sharded by it
    for child in module.modules():
        if isinstance(child, fsdp.FSDPModule):
            child.reshard()


def _check_named(patterns: Iterable[str], module: nn.Module) -> None:
    """Raises `EmaError` for a pattern that names no tensor: a misspelt one would be averaged in silence."""
    names = [plain_name(name) for name in module.state_dict()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise EmaError(f"exclude={pattern!r} names nothing that is averaged: there are {', '.join(names[:10])} ...")


def _load_all(modules: Sequence[nn.Module], states: Sequence[Mapping[str, Any]]) -> None:
    """Load each module's state, or none: torch's own loading has taken in what fits when it raises."""
    before = [
        {name: value.clone() if isinstance(value, Tensor) else value for name, value in module.state_dict().items()}
        for module in modules
    ]
    try:
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(state)
    except RuntimeError as error:
        for module, state in zip(modules, before, strict=True):
            module.load_state_dict(state)
        raise EmaError(f"the saved state is not of this average: {error}") from error


def _restored(schedule: Schedule, description: Mapping[str, Any] | None) -> Schedule:
    if description is None or description == schedule.describe():
        return schedule
    try:
        return from_description(description)
    except EmaError as error:
        raise EmaError(f"the state's schedule is {dict(description)}, this average's {schedule.describe()}") from error


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `DataParallel`, `DistributedDataParallel` and `torch.compile`, however nested."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model
