"""Makes the average that the settings ask for."""

from torch import nn

from emaswap import ModelEMA, PowerFunction, Schedule, make_schedule
from trainer.settings import TrainerSettings

# The parameters of each schedule that are settings.
_PARAMETERS = {
    "constant": ("decay",),
    "exponential_ramp": ("decay", "tau"),
    "count_ramp": ("decay",),
    "inverse_gamma": ("decay",),
    "power_function": ("sigma_rel",),
}


def average_of(model: nn.Module, settings: TrainerSettings) -> ModelEMA:
    """Return an average that starts at the model's present weights. Raises `EmaError` for an impossible width."""
    return ModelEMA(
        model,
        schedule_of(settings),
        update_every=settings.ema_update_every,
        buffers=settings.ema_buffers,
        variants={name: PowerFunction.from_sigma_rel(width) for name, width in settings.variants.items()},
    )


def schedule_of(settings: TrainerSettings) -> Schedule:
    """Return the schedule of the decay, scaled if the batch size is not the one the decay was chosen for."""
    names = _PARAMETERS[settings.ema_schedule]
    parameters = {name: getattr(settings, f"ema_{name}") for name in names}
    if settings.ema_scale != 1:
        parameters["kappa"] = settings.ema_scale
    return make_schedule(settings.ema_schedule, **parameters)
