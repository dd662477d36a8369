"""The average that the settings ask for."""

from torch import nn

from emaswap import ModelEMA, PowerFunction, Schedule, make_schedule
from trainer.settings import TrainerSettings

# Which settings each schedule is made of.
_PARAMETERS = {
    "constant": ("decay",),
    "exponential_ramp": ("decay", "tau"),
    "count_ramp": ("decay",),
    "inverse_gamma": ("decay",),
    "power_function": ("sigma_rel",),
}


def average_of(model: nn.Module, settings: TrainerSettings) -> ModelEMA:
    """The average of a model's weights, started at its present ones. Raises `EmaError` for a width that is none."""
    return ModelEMA(
        model,
        schedule_of(settings),
        update_every=settings.ema_update_every,
        buffers=settings.ema_buffers,
        variants={name: PowerFunction.from_sigma_rel(width) for name, width in settings.variants.items()},
    )


def schedule_of(settings: TrainerSettings) -> Schedule:
    """The decay's schedule; scaled to the size of the batch, where that is not the one it was chosen for."""
    names = _PARAMETERS[settings.ema_schedule]
    parameters = {name: getattr(settings, f"ema_{name}") for name in names}
    if settings.ema_scale != 1:
        parameters["kappa"] = settings.ema_scale
    return make_schedule(settings.ema_schedule, **parameters)
