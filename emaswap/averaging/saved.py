"""The saved state of an average: looked at as a whole before any of it is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from emaswap.errors import EmaError
from emaswap.tensors import differences, in_words

# A float, as schedules are given, tells all numbers up to here apart.
MOST_UPDATES = 2**53
_FIELDS = ("updates", "behind", "skipped", "update_every", "schedule", "ema", "variants")


def check_saved(state: object, variants: Sequence[str]) -> Mapping[str, Any]:
    """Return the state of a `ModelEMA` with these variants. Raises `EmaError` naming the first thing that is wrong."""
    whole = _fields_of("a ModelEMA", state, _FIELDS)
    for name, least in (("updates", 0), ("behind", 0), ("skipped", 0), ("update_every", 1)):
        if type(whole[name]) is not int or not least <= whole[name] <= MOST_UPDATES:
            raise EmaError(
                f"the state's {name} must be an integer of at least {least} and at most {MOST_UPDATES}, got {whole[name]!r}"
            )
    if whole["behind"] >= whole["update_every"] or whole["behind"] > whole["updates"]:
        raise EmaError(
            f"the state is {whole['behind']} updates behind, with {whole['updates']} updates and an average at every "
            f"{whole['update_every']}: these do not fit together"
        )
    saved = whole["variants"]
    if not isinstance(saved, Mapping) or saved.keys() != set(variants):
        there = sorted(map(str, saved)) if isinstance(saved, Mapping) else saved
        raise EmaError(f"the state has the variants {there}, this average {sorted(variants)}")
    for name, each in saved.items():
        _fields_of(f"the variant {name}", each, ("schedule", "ema"))
    for each in (whole, *saved.values()):
        if not isinstance(each["schedule"], Mapping):
            raise EmaError(f"a state's schedule is described by its name and parameters, got {each['schedule']!r}")
    return whole


def load_all(modules: Sequence[nn.Module], states: Sequence[Mapping[str, Any]], *, finite: bool) -> None:
    """Load each module's state, or none: torch's own loading has taken in what fits when it raises.

    With `finite`, no number may be NaN that is not so in the module already.
    """
    before = [
        {name: value.clone() if isinstance(value, Tensor) else value for name, value in module.state_dict().items()}
        for module in modules
    ]
    for own, state in zip(before, states, strict=True):
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            there = ", ".join(map(repr, state)) if isinstance(state, Mapping) else type(state).__name__
            raise EmaError(f"the state's tensors must be there by name, got {there}")
        sides = [{name: value for name, value in each.items() if isinstance(value, Tensor)} for each in (own, state)]
        if found := differences(*sides):
            raise EmaError(f"the saved state is not of this average: {in_words(found)}")
        if finite and (bad := [name for name in sides[0] if _has_more_nans(sides[1][name], sides[0][name])]):
            raise EmaError(f"the saved state has NaNs in {', '.join(bad[:10])}: load an earlier one")
    try:
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(state)
    except Exception as error:  # a module's own hooks may raise anything
        for module, own in zip(modules, before, strict=True):
            module.load_state_dict(own)
        raise EmaError(f"the saved state is not of this average: {error}") from error


def _has_more_nans(value: Tensor, own: Tensor) -> bool:
    return bool((value.isnan() & ~own.isnan().to(value.device)).any())


def _fields_of(what: str, state: object, names: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(state, Mapping) or state.keys() != set(names):
        there = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise EmaError(f"the state of {what} has {', '.join(names)}; this one: {there or 'nothing'}")
    return state
