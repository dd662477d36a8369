"""The private copy of an average that is published: on the CPU, and taken without holding up training.

From a CUDA device, the weights are copied on the device first, in the order of the stream that trains, and from there to
pinned memory on a stream of their own. Only the publisher's thread waits for them, in `PrivateCopy.wait`.
"""

import copy
import threading
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from emaswap.averaging.averaged_module import unwrap
from emaswap.averaging.model_ema import ModelEMA
from emaswap.averaging.schedule import Schedule, decay_at, window
from emaswap.tensors import dtype_name, plain_name
from emaswap.versions.manifest import EmaInfo, TrainingInfo

MAIN = ""


class Staging:
    """A copy of the weights on their device, and the stream that takes them from there to pinned memory."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        self._emptied: torch.cuda.Event | None = None

    def copy(self, sources: list[Tensor], targets: list[Tensor]) -> torch.cuda.Event:
        """Start copying tensors of one CUDA device to pinned ones, and return the event of their arrival."""
        device = sources[0].device
        if [(each.shape, each.dtype, each.device) for each in self._buffers] != [
            (each.shape, each.dtype, each.device) for each in sources
        ]:
            self._buffers = [torch.empty_like(source) for source in sources]
            self._stream, self._emptied = torch.cuda.Stream(device), None  # type: ignore[no-untyped-call]
        assert self._stream is not None
        training = torch.cuda.current_stream(device)
        if self._emptied is not None:
            training.wait_event(self._emptied)  # on the device: the copy before this one is still leaving
        torch._foreach_copy_(self._buffers, sources)
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            for target, buffer in zip(targets, self._buffers, strict=True):
                target.copy_(buffer, non_blocking=True)
            self._emptied = self._stream.record_event()
        return self._emptied


Layout = tuple[type[nn.Module], list[tuple[torch.Size, torch.dtype]]]


class PrivateCopy:
    """Copies of an average and its variants. They are used again, so that taking one costs a copy of the weights."""

    def __init__(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """`dtypes`: of the module that services build, by tensor name; copies are converted to them."""
        self.modules: dict[str, nn.Module] = {}
        self.layouts: dict[str, Layout] = {}
        self.infos: dict[str, EmaInfo] = {}
        self.training = TrainingInfo()
        self._dtypes = dtypes
        self._arrived: torch.cuda.Event | None = None

    # Copies that are made in inference mode could not be written to outside of it.
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def take(
        self, ema: ModelEMA | nn.Module, training: TrainingInfo, staging: Staging, averaged: EmaInfo | None = None
    ) -> None:
        """Copy the weights as they are now; call `wait` before they are used.

        Args:
            ema: the average, or a plain module.
            training: where training stands.
            staging: takes weights off a CUDA device.
            averaged: how a plain module was averaged, if it was.
        """
        if isinstance(ema, ModelEMA):
            sources = {MAIN: ema.ema, **ema.variants}
            schedules = {MAIN: ema.decay, **ema.schedules}
            self.infos = {name: _info(ema, schedules[name], source) for name, source in sources.items()}
        else:
            sources = {MAIN: unwrap(ema)}
            self.infos = {MAIN: averaged or EmaInfo()}
        self.training = training
        layouts = {name: _layout_of(source) for name, source in sources.items()}
        if layouts != self.layouts:
            self.modules = {name: _private(source, self._dtypes) for name, source in sources.items()}
            self.layouts = layouts
            return
        mine = [tensor for module in self.modules.values() for tensor in _state(module)]
        theirs = [tensor for source in sources.values() for tensor in _state(source)]
        if not theirs:
            return
        if all(tensor.is_cuda and tensor.device == theirs[0].device for tensor in theirs):
            self._arrived = staging.copy(theirs, mine)
        else:
            torch._foreach_copy_(mine, theirs)

    def wait(self) -> None:
        """Return when the weights have arrived on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None


class Tray:
    """Where the newest copy waits for the publisher's thread. A newer one replaces it; at most two are in use."""

    def __init__(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """`dtypes`: see `PrivateCopy`."""
        self._dtypes = dtypes
        self._staging = Staging()
        self._waiting: PrivateCopy | None = None
        self._spare: list[PrivateCopy] = []
        self._lock = threading.Lock()

    def put(self, ema: ModelEMA | nn.Module, training: TrainingInfo, averaged: EmaInfo | None) -> bool:
        """Copy the weights as they are now: see `PrivateCopy.take`. Return whether no other copy was waiting."""
        with self._lock:
            is_first = self._waiting is None
            copied = self._waiting or (self._spare.pop() if self._spare else PrivateCopy(self._dtypes))
            self._waiting = None
            copied.take(ema, training, self._staging, averaged)
            self._waiting = copied
        return is_first

    def take(self) -> PrivateCopy | None:
        """Take the copy that waits, if there is one. `give_back` it when it is published."""
        with self._lock:
            copied, self._waiting = self._waiting, None
        return copied

    def give_back(self, copied: PrivateCopy) -> None:
        """Let the memory of a copy be used again."""
        with self._lock:
            self._spare.append(copied)


def state_dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtypes of a module's parameters and buffers by plain name, the non-persistent buffers among them."""
    return {
        plain_name(name): tensor.dtype
        for tensors in (
            module.named_parameters(remove_duplicate=False),
            module.named_buffers(remove_duplicate=False),
        )
        for name, tensor in tensors
    }


def _layout_of(module: nn.Module) -> Layout:
    """Return what two modules have in common when the weights of one can be copied into the other."""
    return type(module), [(tensor.shape, tensor.dtype) for tensor in _state(module)]


def _private(source: nn.Module, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """Return a copy on the CPU, in pinned memory when the weights come from a CUDA device."""
    module = copy.deepcopy(source).cpu().eval()
    _convert(module, dtypes)
    if any(tensor.is_cuda for tensor in _state(source)):
        module._apply(lambda tensor: tensor.pin_memory())  # type: ignore[no-untyped-call]
    return module


def _convert(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give floating-point tensors the dtypes of their names."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            dtype = dtypes.get(plain_name(f"{prefix}.{name}" if prefix else name))
            if tensor is not None and dtype is not None and tensor.is_floating_point() and dtype.is_floating_point:
                tensor.data = tensor.data.to(dtype)


def _state(module: nn.Module) -> list[Tensor]:
    # Non-persistent buffers, too: they are no part of the weights, but the probe's answers depend on them.
    return [*module.parameters(), *module.buffers()]


def _info(ema: ModelEMA, schedule: Schedule, module: nn.Module) -> EmaInfo:
    averaged = next((tensor for tensor in module.state_dict().values() if tensor.is_floating_point()), None)
    return EmaInfo.model_validate(
        {
            "schedule": schedule.describe(),
            "updates": ema.updates,
            "update_every": ema.update_every,
            "window": window(decay_at(schedule, ema.updates)) if ema.updates else None,
            "dtype": dtype_name(averaged.dtype) if averaged is not None else "none",
        }
    )
