"""How `forward` is called: inputs bound by name, outputs picked by name, and nothing guessed."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from emaswap import Signature, TensorField
from emaswap.versions.forward import Binding, pick

A, B = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]])


def signature(*names: str) -> Signature:
    """Inputs of these names, each row a number, to one output."""
    return Signature(
        inputs=tuple(TensorField(name=name, shape=(1,)) for name in names),
        outputs=(TensorField(name="out", shape=(1,)),),
    )


class Module(nn.Module):
    """Has the `forward` that it is given."""

    def __init__(self, forward: Callable[..., object]) -> None:
        super().__init__()
        self.forward = MethodType(forward, self)


class Encoder(nn.Module):
    """Takes what a text encoder takes, in its order."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        return input_ids * mask + 100 * kinds


def minus(self: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """The plain case."""
    return a - b


def minus_only_by_position(self: nn.Module, a: Tensor, b: Tensor, /) -> Tensor:
    """No keywords."""
    return a - b


def minus_only_by_keyword(self: nn.Module, *, a: Tensor, b: Tensor) -> Tensor:
    """Nothing but keywords."""
    return a - b


def minus_more(self: nn.Module, a: Tensor, b: Tensor, *more: Tensor, **options: object) -> Tensor:
    """Takes more than it names."""
    assert not more
    assert not options
    return a - b


def minus_anything_named(self: nn.Module, **inputs: Tensor) -> Tensor:
    """Names no parameter, and takes nothing by position."""
    return inputs["a"] - inputs["b"]


def minus_with_defaults(
    self: nn.Module, first: Tensor | None = None, b: Tensor | None = None, a: Tensor | None = None, flag: bool = True
) -> Tensor:
    """The parameters that are given come last and in another order."""
    assert first is None
    assert a is not None
    assert b is not None
    return a - b


def wrapped(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorated, as libraries decorate it."""

    @functools.wraps(forward)
    def decorated(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs)

    return decorated


FORWARDS = [minus, minus_only_by_position, minus_only_by_keyword, minus_more, minus_anything_named, minus_with_defaults]


# -- inputs --------------------------------------------------------------------------------------------------------


def test_an_input_goes_to_the_parameter_of_its_name() -> None:
    """Inputs that leave out a parameter between them are not moved up: token types are no attention mask."""
    inputs = {"input_ids": A, "token_type_ids": B}
    out = signature("input_ids", "token_type_ids").run(Encoder(), inputs)["out"]
    assert torch.equal(out, Encoder()(**inputs))
    assert not torch.equal(out, Encoder()(A, B))


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")], ids=["in turn", "in another order"])
@pytest.mark.parametrize("forward", [*FORWARDS, wrapped(minus)], ids=lambda forward: str(forward.__name__))
def test_names_bind_whatever_kind_of_parameter_has_them(forward: Callable[..., Tensor], order: tuple[str, str]) -> None:
    """Positional, keyword and optional parameters get the inputs of their names, in whichever order these are listed."""
    assert torch.equal(signature(*order).run(Module(forward), {"a": A, "b": B})["out"], A - B)


def data_parallel(module: nn.Module) -> nn.Module:
    return nn.DataParallel(module)


def compiled(module: nn.Module) -> nn.Module:
    wrapped = torch.compile(module, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


def with_hooks(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, args: tuple(arg + 0 for arg in args))
    return module


def with_a_replaced_forward(module: nn.Module) -> nn.Module:
    old = module.forward
    module.forward = functools.update_wrapper(functools.partial(old), old)
    return module


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "wrap",
    [data_parallel, compiled, with_hooks, with_a_replaced_forward, torch.jit.script],
    ids=["DataParallel", "torch.compile", "hooks", "a replaced forward", "TorchScript"],
)
def test_wrappers_are_seen_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """However a module is wrapped, the names are those of its own `forward`."""

    class Minus(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    module = wrap(Minus())
    assert torch.equal(signature("b", "a").run(module, {"a": A, "b": B})["out"], A - B)


def test_hooks_see_what_they_would_see_of_a_plain_call() -> None:
    """The first parameters are passed by position: a pre-hook that looks at its arguments finds them."""
    seen: list[int] = []
    module = Encoder()
    module.register_forward_pre_hook(lambda module, args: seen.append(len(args)))
    signature("input_ids", "token_type_ids").run(module, {"input_ids": A, "token_type_ids": B})
    assert seen == [1]


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, rows: rows,
        lambda self, rows, /: rows,
        lambda self, rows, scale=1: rows * scale,
        lambda self, *rows: rows[0],
        lambda self, *rows, **options: rows[0],
        lambda self, **inputs: next(iter(inputs.values())),
    ],
    ids=["one", "by position", "one and an option", "any number", "anything", "any name"],
)
@pytest.mark.parametrize("name", ["input", "image"])
def test_a_single_input_needs_no_parameter_of_its_name(forward: Callable[..., Tensor], name: str) -> None:
    """One input can only be the first argument."""
    assert torch.equal(signature(name).run(Module(forward), {name: A})["out"], A)


@pytest.mark.parametrize(
    ("forward", "names", "problem"),
    [
        (minus, ("a", "c"), "no parameter for 'c'"),
        (minus, ("x", "y"), "no parameter for 'x', 'y'"),
        (minus, ("a", "b", "c"), "no parameter for 'c'"),
        (minus_more, ("a", "b", "c"), "no parameter for 'c'"),
        (lambda self, *rows: rows[0], ("a", "b"), "no parameter for 'a', 'b'"),
        (lambda self, *rows, **named: rows[0], ("a", "b"), "no parameter for 'a', 'b'"),
        (lambda self, a, **named: a, ("a", "b"), "no parameter for 'b'"),
        (minus, ("a",), "also requires 'b'"),
        (minus, ("input",), "also requires 'b'"),
        (minus_only_by_keyword, ("input",), "no parameter for 'input'"),
        (lambda self, a=None, b=None, /: b, ("b",), "by position only"),
    ],
    ids=[
        "one of two is misspelt",
        "none is known",
        "one too many",
        "one more, where more are taken",
        "any number",
        "anything",
        "any further name",
        "one is missing",
        "one for two",
        "one for keywords",
        "a gap before it",
    ],
)
def test_what_would_be_a_guess_is_refused(forward: Callable[..., Tensor], names: tuple[str, ...], problem: str) -> None:
    """Where names and positions could both be meant, the error shows `forward` and the names that it lacks."""
    with pytest.raises(TypeError, match=rf"Module\.forward\(.*{problem}"):
        signature(*names).bind(Module(forward))


def test_a_named_input_must_have_a_parameter_where_it_is_to_be_strict() -> None:
    """One name that `forward` does not know is refused, too, when somebody chose it as the parameter's."""
    assert Binding.of(Encoder(), ["text"]).positional == ("text",)
    with pytest.raises(TypeError, match="no parameter for 'text'"):
        Binding.of(Encoder(), ["text"], strict=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_traced_module_has_names_too() -> None:
    """Of a traced module the names are known from its schema."""

    class Minus(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    traced = torch.jit.trace(Minus(), (A, B))  # type: ignore[no-untyped-call]
    assert torch.equal(signature("b", "a").run(traced, {"a": A, "b": B})["out"], A - B)


def test_inferring_binds_by_name() -> None:
    """A signature that is read off named inputs has recorded what their names say."""
    with pytest.raises(TypeError, match="no parameter for 'token_type_idz'"):
        Signature.infer(Encoder(), {"input_ids": A, "token_type_idz": B})
    with pytest.raises(TypeError, match="no parameter for 'text'"):
        Signature.infer(Encoder(), {"text": A})
    assert [field.name for field in Signature.infer(Encoder(), {"token_type_ids": B, "input_ids": A}).inputs] == [
        "token_type_ids",
        "input_ids",
    ]


# -- outputs -------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Outputs as a dataclass."""

    logits: Tensor
    loss: Tensor | None = None
    cache: object = None


class Named(NamedTuple):
    """Outputs as a named tuple."""

    logits: Tensor
    loss: Tensor | None = None
    cache: object = None


CACHE = ((A, B), (A, B))


@pytest.mark.parametrize(
    "returned",
    [
        A,
        (A, None),
        [A],
        (None, A),
        (A, CACHE),
        (A, SimpleNamespace(keys=B)),
        {"logits": A},
        {"loss": None, "logits": A, "cache": CACHE},
        {"more": B, "logits": A},
        OrderedDict(logits=A, hidden=B),
        Data(A),
        Data(A, cache=CACHE),
        Named(A),
        Named(A, B, CACHE),
        Named(A, None, CACHE),
    ],
    ids=lambda returned: type(returned).__name__,
)
def test_the_named_output_is_picked(returned: object) -> None:
    """From whatever a module returns, the output of the signature's name comes out; `None` and caches do not matter."""
    assert pick(returned, ["logits"]) == {"logits": A}


def test_outputs_in_a_plain_tuple_have_names_by_position() -> None:
    """Of a tuple with more tensors than outputs, those that are named by their position are picked."""
    assert pick((A, B, A), ["output_1"]) == {"output_1": B}
    assert pick((A, B), ["logits", "mean"]) == {"logits": A, "mean": B}


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        (
            (A, B),
            r"returned 2 outputs, the signature has 1: 'logits' cannot be picked from 'output' \(float32 of shape",
        ),
        ({"other": A}, r"'logits' cannot be picked from 'other' \(float32 of shape \(2, 1\)\)"),
        ({"logits": CACHE}, r"'logits' is a tuple, expected a tensor; returned: 'logits' \(a tuple\)"),
        (Data(None, A), "'logits' cannot be picked from 'loss'"),  # type: ignore[arg-type]
        (Named(None), "'logits' cannot be picked from nothing"),  # type: ignore[arg-type]
        ((None, None), "returned 0 outputs"),
        ("text", "returned 1 outputs.*a str"),
    ],
    ids=["two tensors", "another name", "nested", "it is None", "all are None", "only None", "a text"],
)
def test_an_output_that_cannot_be_picked_is_named(returned: object, problem: str) -> None:
    """The error says which output is wanted, and what the module returned."""
    with pytest.raises((ValueError, TypeError), match=problem):
        pick(returned, ["logits"])


def returning(function: Callable[[Tensor], object]) -> nn.Module:
    """A module that answers with a function of its rows."""
    return Module(lambda self, rows: function(rows))


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda rows: (rows, None), ["output"]),
        (lambda rows: Data(rows, rows), ["logits", "loss"]),
        (Named, ["logits"]),
        (lambda rows: {"loss": None, "logits": rows}, ["logits"]),
    ],
    ids=["a tuple with None", "a dataclass", "a named tuple", "a mapping with None"],
)
def test_names_of_outputs_are_inferred(function: Callable[[Tensor], object], names: list[str]) -> None:
    """Without a signature, all that is not `None` is an output under its name."""
    assert [field.name for field in Signature.infer(returning(function), A).outputs] == names


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda rows: rows.to(torch.complex64), "complex64, which cannot be served"),
        (lambda rows: rows.to(torch.uint16), "uint16, which cannot be served"),
        (lambda rows: rows[:, :0], r"rows without numbers: its shape is \(2, 0\)"),
        (lambda rows: rows.sum(), r"shape \(\): expected 2 rows"),
        (lambda rows: rows.expand(2, 5).T, r"shape \(5, 2\): expected 2 rows"),
        (lambda rows: rows[:1], r"shape \(1, 1\): expected 2 rows"),
        (lambda rows: {"logits": rows, "loss": rows.mean()}, r"'loss' has shape \(\).*Give a Signature without it"),
        (lambda rows: {"logits": rows, "cache": CACHE}, "'cache' is a tuple.*Give a Signature that names"),
        (lambda rows: rows.tolist(), "'output' is a list, expected a tensor"),
        (lambda rows: rows.numpy(), "'output' is a ndarray, expected a tensor"),
    ],
    ids=[
        "complex",
        "an integer that few know",
        "rows of no numbers",
        "one number",
        "rows last",
        "one row for all",
        "a loss beside it",
        "a cache beside it",
        "lists",
        "numpy",
    ],
)
def test_outputs_that_cannot_be_served_have_no_signature(function: Callable[[Tensor], object], problem: str) -> None:
    """The error says which output it is, what came, and what to do."""
    with pytest.raises((ValueError, TypeError), match=problem):
        Signature.infer(returning(function), A)


def test_inputs_of_different_numbers_of_rows_are_refused() -> None:
    """Three rows of one input do not go with two of another."""
    with pytest.raises(ValueError, match="different numbers of rows"):
        signature("a", "b").name_inputs({"a": A, "b": torch.zeros(3, 1)})


def test_a_bound_module_runs_many_batches() -> None:
    """What is bound once answers each batch like `run`."""
    bound = signature("b", "a").bind(Module(minus))
    batches: list[Mapping[str, Tensor]] = [{"a": A, "b": B}, {"a": B, "b": A}]
    assert [bound(batch)["out"].tolist() for batch in batches] == [(A - B).tolist(), (B - A).tolist()]
