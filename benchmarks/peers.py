"""The averages of others, each in its quickest form, for comparison. Those that are not installed are left out."""

import copy
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

_DECAY = 0.999

Update = Callable[[], object]


def peers(model: nn.Module) -> dict[str, Update]:
    """What makes one update with this model, by the name of its library."""
    found = {"YOLOv5's loop": _loop(model), "torch AveragedModel": _torch(model)}
    for name, make in (
        ("timm ModelEmaV3", _timm),
        ("ema-pytorch", _ema_pytorch),
        ("torch-ema", _torch_ema),
        ("diffusers EMAModel", _diffusers),
    ):
        try:
            found[name] = make(model)
        except ImportError:
            continue
    return found


def _loop(model: nn.Module) -> Update:
    """average ← d·average + (1 − d)·weights over the state dict, entry by entry, as training scripts have it."""
    average = copy.deepcopy(model).eval()

    def update() -> None:
        with torch.no_grad():
            weights = model.state_dict()
            for name, value in average.state_dict().items():
                if value.is_floating_point():
                    value.mul_(_DECAY)
                    value.add_((1 - _DECAY) * weights[name].detach())

    return update


def _torch(model: nn.Module) -> Update:
    multi_avg_fn = get_ema_multi_avg_fn(_DECAY)  # type: ignore[no-untyped-call]
    averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn, use_buffers=True)
    return lambda: averaged.update_parameters(model)


def _timm(model: nn.Module) -> Update:
    _mend_torchvision()
    ema = importlib.import_module("timm.utils.model_ema").ModelEmaV3(model, decay=_DECAY)
    return lambda: ema.update(model)


def _ema_pytorch(model: nn.Module) -> Update:
    ema = importlib.import_module("ema_pytorch").EMA(
        model, beta=_DECAY, update_after_step=0, update_every=1, use_foreach=True, include_online_model=False
    )
    update: Update = ema.update
    return update


def _torch_ema(model: nn.Module) -> Update:
    ema = importlib.import_module("torch_ema").ExponentialMovingAverage(model.parameters(), decay=_DECAY)
    update: Update = ema.update
    return update


def _diffusers(model: nn.Module) -> Update:
    _mend_torchvision()
    ema = importlib.import_module("diffusers.training_utils").EMAModel(model.parameters(), decay=_DECAY, foreach=True)
    return lambda: ema.step(model.parameters())


_operators: list[Any] = []


def _mend_torchvision() -> None:
    """A torchvision made for CUDA refuses to be imported beside a torch for the CPU unless its operators are defined."""
    if importlib.util.find_spec("torchvision") is None or _operators:
        return
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.append(library)
