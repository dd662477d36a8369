"""How a module's `forward` is called: named inputs bound to its parameters, and outputs picked by name from its result.

Knows names alone. Dtypes and shapes are the signature's.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter

import torch
from torch import Tensor, nn

from emaswap.averaging.averaged_module import unwrap
from emaswap.tensors import dtype_name

_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Binding:
    """Which inputs are passed by position, in this order, and which by keyword."""

    positional: tuple[str, ...]
    keyword: tuple[str, ...] = ()

    @classmethod
    def of(cls, module: nn.Module, names: Sequence[str], *, strict: bool = False) -> "Binding":
        """Decide how a module takes inputs of these names.

        Inputs are bound by name. A single input that has no parameter of its name is the first argument, unless this
        is `strict`. Raises `TypeError` when anything else would be a guess, or when `forward` requires more inputs.
        """
        parameters = _parameters(module)
        unknown = [name for name in names if name not in parameters.named]
        if not unknown:
            return _complete(_by_name(parameters, names), parameters, names)
        if len(names) == 1 and not strict and (parameters.positional or parameters.takes_more):
            return _complete(cls((names[0],)), parameters, parameters.positional[:1])
        if not parameters.named and parameters.takes_keywords and not parameters.takes_more:
            return cls((), tuple(names))
        raise TypeError(
            f"{parameters} has no parameter for {_list(unknown)}, so it is unclear which input is which: "
            "name every input after a parameter, or wrap the module in one whose forward has these parameters"
        )


@dataclass(frozen=True)
class _Parameters:
    """The parameters of a `forward`."""

    text: str
    named: dict[str, Parameter]
    takes_more: bool
    takes_keywords: bool

    @property
    def positional(self) -> list[str]:
        return [name for name, parameter in self.named.items() if parameter.kind in _BY_POSITION]

    @property
    def required(self) -> list[str]:
        return [name for name, parameter in self.named.items() if parameter.default is Parameter.empty]

    def __str__(self) -> str:
        return self.text


def _parameters(module: nn.Module) -> _Parameters:
    inner = module if isinstance(module, torch.jit.ScriptModule) else unwrap(module)
    try:
        every = list(inspect.signature(inner.forward).parameters.values())
    except ValueError:  # a traced module has a schema instead
        every = [
            Parameter(
                argument.name,
                Parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value if argument.has_default_value() else Parameter.empty,
            )
            for argument in inner.forward.schema.arguments[1:]  # type: ignore[attr-defined]
        ]
    kinds = {parameter.kind for parameter in every}
    shown = ", ".join(str(parameter.replace(annotation=Parameter.empty)) for parameter in every)
    return _Parameters(
        text=f"{type(inner).__name__}.forward({shown})",
        named={p.name: p for p in every if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)},
        takes_more=Parameter.VAR_POSITIONAL in kinds,
        takes_keywords=Parameter.VAR_KEYWORD in kinds,
    )


def _by_name(parameters: _Parameters, names: Sequence[str]) -> Binding:
    """Pass by position what can be, because hooks see no keywords, and the rest by keyword."""
    positional = []
    for name in parameters.positional:
        if name not in names:
            break
        positional.append(name)
    rest = tuple(name for name in names if name not in positional)
    if hidden := [name for name in rest if parameters.named[name].kind is Parameter.POSITIONAL_ONLY]:
        raise TypeError(
            f"{parameters} takes {_list(hidden)} by position only, after parameters that are not given: give those, too"
        )
    return Binding(tuple(positional), rest)


def _complete(binding: Binding, parameters: _Parameters, given: Sequence[str]) -> Binding:
    """Return the binding if nothing that `forward` requires is missing."""
    if missing := [name for name in parameters.required if name not in given]:
        raise TypeError(f"{parameters} also requires {_list(missing)}: give every input that it requires, by name")
    return binding


def named_outputs(returned: object) -> dict[str, object]:
    """Return the outputs of a module by name, leaving out `None`.

    Mappings, dataclasses and named tuples have names; elements of other tuples and lists are "output", "output_1", ...
    """
    if isinstance(returned, Mapping):
        named = {str(name): value for name, value in returned.items()}
    elif is_dataclass(returned):
        named = {field.name: getattr(returned, field.name) for field in fields(returned)}
    elif isinstance(returned, tuple) and hasattr(returned, "_asdict"):
        named = returned._asdict()
    else:
        return _numbered(returned if isinstance(returned, (list, tuple)) else [returned])
    return {name: value for name, value in named.items() if value is not None}


def pick(returned: object, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the outputs of these names from what a module returned.

    The tensors of a plain tuple or list take the names in order, if there are as many. Raises `ValueError` when an
    output is not there, `TypeError` when it is not a tensor.
    """
    if isinstance(returned, Tensor) and len(names) == 1:
        return {names[0]: returned}
    named = named_outputs(returned)
    tensors = [value for value in named.values() if isinstance(value, Tensor)]
    if _is_unnamed(returned) and len(tensors) == len(names):
        return dict(zip(names, tensors, strict=True))
    if missing := [name for name in names if name not in named]:
        raise ValueError(
            f"the module returned {len(named)} outputs, the signature has {len(names)}: "
            f"{_list(missing)} cannot be picked from {describe(named)}"
        )
    picked: dict[str, Tensor] = {}
    for name in names:
        value = named[name]
        if not isinstance(value, Tensor):
            raise TypeError(
                f"output {name!r} is a {type(value).__name__}, expected a tensor; returned: {describe(named)}"
            )
        picked[name] = value
    return picked


def describe(named: Mapping[str, object]) -> str:
    """Return named outputs in words: each with its dtype and shape, or with its type."""
    parts = [
        f"{name!r} ({dtype_name(value.dtype)} of shape {tuple(value.shape)})"
        if isinstance(value, Tensor)
        else f"{name!r} (a {type(value).__name__})"
        for name, value in list(named.items())[:20]
    ]
    more = [f"{len(named) - 20} more"] if len(named) > 20 else []
    return ", ".join([*parts, *more]) or "nothing"


def _is_unnamed(returned: object) -> bool:
    return not isinstance(returned, Mapping) and not is_dataclass(returned) and not hasattr(returned, "_asdict")


def _numbered(values: Iterable[object]) -> dict[str, object]:
    there = [value for value in values if value is not None]
    return {f"output_{number}" if number else "output": value for number, value in enumerate(there)}


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
