"""A private copy of an average on the CPU, taken without holding up whoever trains: the snapshot that is published.

From a CUDA device, the weights are copied on the device first, in the order of the stream that trains, and from there to
pinned memory on a stream of their own. Nobody waits but the publisher's thread, in `wait`.
"""

import copy

import torch
from torch import Tensor, nn

from emaswap.averaging.model_ema import ModelEMA, unwrap
from emaswap.averaging.schedule import Schedule, window
from emaswap.tensors import dtype_name
from emaswap.versions.manifest import EmaInfo, TrainingInfo

MAIN = ""


class Staging:
    """A copy of the weights on their device, and the stream that takes them from there to pinned memory."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        self._emptied: torch.cuda.Event | None = None

    def copy(self, sources: list[Tensor], targets: list[Tensor]) -> torch.cuda.Event:
        """Start copying tensors of one CUDA device to pinned ones; the event is when they have arrived."""
        device = sources[0].device
        if [(each.shape, each.dtype, each.device) for each in self._buffers] != [
            (each.shape, each.dtype, each.device) for each in sources
        ]:
            self._buffers = [torch.empty_like(source) for source in sources]
            self._stream, self._emptied = torch.cuda.Stream(device), None  # type: ignore[no-untyped-call]
        assert self._stream is not None
        training = torch.cuda.current_stream(device)
        if self._emptied is not None:
            training.wait_event(self._emptied)  # on the device: the snapshot before this one is still leaving
        torch._foreach_copy_(self._buffers, sources)
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            for target, buffer in zip(targets, self._buffers, strict=True):
                target.copy_(buffer, non_blocking=True)
            self._emptied = self._stream.record_event()
        return self._emptied


class PrivateCopy:
    """Copies of an average and of its variants, used again and again so that taking one costs a copy of the weights."""

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.infos: dict[str, EmaInfo] = {}
        self.training = TrainingInfo()
        self._arrived: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(
        self, ema: ModelEMA | nn.Module, training: TrainingInfo, staging: Staging, averaged: EmaInfo | None = None
    ) -> None:
        """Copy the weights as they are now; before they are used, `wait`. `averaged`: how a plain module was, if at all."""
        if isinstance(ema, ModelEMA):
            sources = {MAIN: ema.ema, **ema.variants}
            schedules = {MAIN: ema.decay, **ema.schedules}
            self.infos = {name: _info(ema, schedules[name], source) for name, source in sources.items()}
        else:
            sources = {MAIN: unwrap(ema)}
            self.infos = {MAIN: averaged or EmaInfo()}
        self.training = training
        if self.modules.keys() != sources.keys() or any(
            layout_of(self.modules[name]) != layout_of(source) for name, source in sources.items()
        ):
            self.modules = {name: _private(source) for name, source in sources.items()}
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


Layout = tuple[type[nn.Module], list[tuple[torch.Size, torch.dtype]]]


def layout_of(module: nn.Module) -> Layout:
    """What two modules have in common when the weights of one can be copied into the other."""
    return type(module), [(tensor.shape, tensor.dtype) for tensor in _state(module)]


def _private(source: nn.Module) -> nn.Module:
    """A copy on the CPU, in pinned memory when the weights come from a CUDA device."""
    module = copy.deepcopy(source).cpu().eval()
    if any(tensor.is_cuda for tensor in _state(source)):
        module._apply(lambda tensor: tensor.pin_memory())  # type: ignore[no-untyped-call]
    return module


def _state(module: nn.Module) -> list[Tensor]:
    # Non-persistent buffers, too: they are no part of the weights, but the probe's answers depend on them.
    return [*module.parameters(), *module.buffers()]


def _info(ema: ModelEMA, schedule: Schedule, module: nn.Module) -> EmaInfo:
    averaged = next((tensor for tensor in module.state_dict().values() if tensor.is_floating_point()), None)
    return EmaInfo.model_validate(
        {
            **schedule.describe(),
            "updates": ema.updates,
            "update_every": ema.update_every,
            "window": window(schedule(ema.updates)),
            "dtype": dtype_name(averaged.dtype) if averaged is not None else "none",
        }
    )
