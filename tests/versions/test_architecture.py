"""Building a module from trusted factories only, and filling it with verified weights."""

import asyncio
import io
import math
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from emaswap import Architecture, BadVersion, Constant, EmaswapError, ModelEMA, Reason, Short
from emaswap.files.tensor_file import read, write
from emaswap.tensors import named_tensors
from emaswap.versions.architecture import build, fill, is_trusted
from tests.models import Everything, Linear

SOURCE = """
from functools import lru_cache
from pathlib import Path
from torch import nn
from torch.nn import Linear
from os import remove

Path(__file__).with_suffix(".imported").touch()
answer = 42

class Net(nn.Module):
    def __init__(self, width=1):
        super().__init__()
        self.layer = nn.Linear(width, width)

def make(width=1):
    return Net(width)

def text():
    return "not a module"

def cls():
    return Net

def fail():
    raise RuntimeError("no such luck")
"""


@dataclass(frozen=True)
class Package:
    """A package on the path that leaves a file behind when its code runs."""

    folder: Path

    @property
    def was_imported(self) -> bool:
        """Whether any of its code has run."""
        return bool(list(self.folder.rglob("*.imported")))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """A package `nets` with a module `nets.small`, and modules `netsx` and `broken` beside it, on the import path."""
    (tmp_path / "nets").mkdir()
    for path in ("nets/__init__.py", "nets/small.py", "netsx.py"):
        (tmp_path / path).write_text(SOURCE)
    (tmp_path / "broken.py").write_text("raise ImportError('half installed')")
    monkeypatch.syspath_prepend(tmp_path)
    yield Package(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nets", "netsx", "broken")]:
        del sys.modules[name]


def reason_for(factory: str, *trusted: str, **arguments: int) -> Reason:
    """Why building from this factory is refused."""
    with pytest.raises(BadVersion, match=factory) as raised:
        build(Architecture(factory=factory, arguments=dict(arguments)), trusted=trusted)
    return raised.value.reason


# -- trust ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "trusted", "expected"),
    [
        pytest.param("a.b:Net", [], False, id="nothing trusted"),
        pytest.param("a.b:Net", ["a.b:Net"], True, id="itself"),
        pytest.param("a.b:Net", ["a.b:Other"], False, id="another of its module"),
        pytest.param("a.b:Net", ["a.b:Net2"], False, id="a longer name"),
        pytest.param("a.b:Net2", ["a.b:Net"], False, id="a shorter name"),
        pytest.param("a.b:Net", ["a.*"], True, id="the package above"),
        pytest.param("a.b.c:Net", ["a.*"], True, id="a package further above"),
        pytest.param("a:Net", ["a.*"], True, id="the package itself"),
        pytest.param("a.b:Net", ["a.b.*"], True, id="the module as a package"),
        pytest.param("a.b:Net", ["a.b.c.*"], False, id="a package below"),
        pytest.param("ab:Net", ["a.*"], False, id="a package that begins alike"),
        pytest.param("a.bc:Net", ["a.b.*"], False, id="a module that begins alike"),
        pytest.param("b.a:Net", ["a.*"], False, id="the package's name further down"),
        pytest.param("a.b:Net", ["a.b"], False, id="a module without a star"),
        pytest.param("a.b:Net", ["a.b:*"], False, id="a star for the name"),
        pytest.param("a.b:Net", ["*"], False, id="a star alone"),
        pytest.param("a.b:Net", [".*"], False, id="a dot and a star"),
        pytest.param("a.b:Net", ["a*"], False, id="a star without a dot"),
        pytest.param("a.b:Net", [""], False, id="nothing at all"),
        pytest.param("a.b:Net", ["c.*", "a.b:Net"], True, id="one of several"),
    ],
)
def test_trust_is_by_whole_names(factory: str, trusted: list[str], expected: bool) -> None:
    """A factory is trusted by its full name, or by a package that it is in or below; names that begin alike are not."""
    assert is_trusted(factory, trusted) is expected


@pytest.mark.parametrize(
    ("factory", "trusted"),
    [
        pytest.param("nets.small:Net", (), id="nothing trusted"),
        pytest.param("nets.small:Net", ("nets.small:make", "netsx.*"), id="others trusted"),
        pytest.param("netsx:Net", ("nets.*",), id="a name that begins alike"),
    ],
)
def test_code_that_is_not_trusted_does_not_run(package: Package, factory: str, trusted: tuple[str, ...]) -> None:
    """A factory that is not trusted is refused without being imported, nor any package above it."""
    assert reason_for(factory, *trusted) == Reason.UNTRUSTED_FACTORY
    assert not package.was_imported


def test_a_refusal_says_how_to_trust() -> None:
    """The message names the trusted factories, and the flag that would add this one."""
    with pytest.raises(BadVersion, match=r"\(emaswap\.models\.\*\).*--trust nets\.small:Net"):
        build(Architecture(factory="nets.small:Net"))


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("trusted", ["nets.*", "nets.small.*", "nets.small:Net"])
def test_a_trusted_class_is_built(trusted: str) -> None:
    """A class is built with its arguments, in eval mode and without gradients, whichever way it is trusted."""
    module = build(Architecture(factory="nets.small:Net", arguments={"width": 3}), trusted=[trusted])
    assert module.state_dict()["layer.weight"].shape == (3, 3)
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.usefixtures("package")
def test_a_trusted_function_is_called() -> None:
    """A factory may be a function that returns a module."""
    module = build(Architecture(factory="nets.small:make", arguments={"width": 2}), trusted=["nets.*"])
    assert type(module).__name__ == "Net"


def test_the_reference_networks_are_trusted_by_default() -> None:
    """Without a list, the project's own networks are trusted, and no others."""
    assert isinstance(build(Architecture(factory="emaswap.models.digits:DigitsNet")), nn.Module)
    with pytest.raises(BadVersion) as raised:
        build(Architecture(factory="tests.models:Linear"))
    assert raised.value.reason == Reason.UNTRUSTED_FACTORY


@pytest.mark.parametrize("name", ["Linear", "nn", "lru_cache", "remove", "answer", "Path"])
def test_a_package_is_trusted_for_what_it_defines(package: Package, name: str) -> None:
    """What a trusted module merely imports is refused, and nothing is called."""
    file = package.folder / "keep"
    file.touch()
    architecture = Architecture(factory=f"nets.small:{name}", arguments={"path": str(file)})
    with pytest.raises(BadVersion, match=f"nets.small:{name} is imported from elsewhere"):
        build(architecture, trusted=["nets.*"])
    assert file.exists()


@pytest.mark.usefixtures("package")
def test_what_is_named_exactly_may_be_defined_elsewhere() -> None:
    """A factory that a module imports can be used where it is trusted by its own name there."""
    architecture = Architecture(factory="nets.small:Linear", arguments={"in_features": 2, "out_features": 1})
    assert type(build(architecture, trusted=["nets.small:Linear"])) is nn.Linear


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    "factory",
    [
        pytest.param("nets.small:fail", id="it raises"),
        pytest.param("nets.small:text", id="it returns no module"),
        pytest.param("nets.small:cls", id="it returns a class"),
        pytest.param("nets.small:answer", id="it is no function"),
        pytest.param("nets.small:missing", id="it is not there"),
        pytest.param("nets.missing:Net", id="its module is not there"),
        pytest.param("missing_altogether:Net", id="its package is not there"),
        pytest.param("broken:Net", id="its module does not import"),
    ],
)
def test_a_trusted_factory_that_fails_is_a_bad_version(factory: str) -> None:
    """Whatever is wrong with a trusted factory, the version is refused for it, by name."""
    assert reason_for(factory, factory, "nets.*") == Reason.FACTORY_FAILED


class _Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        GeneratorExit(),
        asyncio.CancelledError(),
        BaseException("odd"),
        _Mute(),
        BadVersion(Reason.STALE_TERM, "a lie"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_factory_raises_it_has_failed(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """No exception of a factory's gets away, not even one that has no text or speaks of another reason."""

    def fails() -> None:
        raise error

    monkeypatch.setitem(globals(), "fails", fails)
    fails.__module__, fails.__qualname__ = __name__, "fails"
    trusted = f"{__name__}:fails"
    like = {"weight": torch.zeros(1)}
    with pytest.raises(BadVersion) as raised:
        build(Architecture(factory=trusted), trusted=[trusted], like=like)
    assert raised.value.reason == Reason.FACTORY_FAILED


def test_ctrl_c_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stops the program while a factory runs stops the program."""

    def waits() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(globals(), "waits", waits)
    with pytest.raises(KeyboardInterrupt):
        build(Architecture(factory=f"{__name__}:waits"), trusted=[f"{__name__}:waits"])


@pytest.mark.usefixtures("package")
def test_wrong_arguments_are_a_bad_version() -> None:
    """Arguments that the factory does not take are refused by name."""
    with pytest.raises(BadVersion, match="height") as raised:
        build(Architecture(factory="nets.small:Net", arguments={"height": 3}), trusted=["nets.*"])
    assert raised.value.reason == Reason.FACTORY_FAILED


# -- what a manifest says of it ------------------------------------------------------------------------------------


@dataclass
class Config:
    """A model's settings, as many keep them."""

    width: int = 3


class Kind(StrEnum):
    """Text with a name."""

    SMALL = "small"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (torch.tensor(7), 7),
        (Path("folder/file"), "folder/file"),
        ((3, 3), [3, 3]),
        (torch.Size([2, 3]), [2, 3]),
        ([np.int64(1), (2, {"a": np.int8(3)})], [1, [2, {"a": 3}]]),
        (OrderedDict(a=1), {"a": 1}),
        (MappingProxyType({"a": (1,)}), {"a": [1]}),
        (Kind.SMALL, "small"),
        (10**30, 10**30),
        (None, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arguments_become_plain_values_where_nothing_is_lost(given: object, kept: object) -> None:
    """Numbers of numpy and torch, paths, tuples and mappings are written as JSON has them, and come back so."""
    architecture = Architecture.of(Linear, inputs=given)
    assert architecture.arguments == {"inputs": kept}
    assert type(architecture.arguments["inputs"]) is type(kept)
    assert Architecture.model_validate_json(architecture.model_dump_json()) == architecture
    assert Architecture(factory="a:b", arguments={"inputs": given}).arguments == {"inputs": kept}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (Config(), r"is a Config, .*def build\(\*\*fields\)"),
        (SimpleNamespace(width=3), "is a SimpleNamespace, .*def build"),
        (torch.bfloat16, "is a dtype, .*its name, 'bfloat16'.*getattr"),
        (torch.device("cpu"), "is a device, .*leave it out"),
        (torch.ones(3), r"is a Tensor, .*\.tolist\(\)"),
        (np.ones(3), r"is a ndarray, .*\.tolist\(\)"),
        ({1: 2}, "is a dict, .*keys must be strings"),
        ({1, 2}, "is a set, .*sorted list"),
        (nn.ReLU(), "is a ReLU, .*def build"),
        (nn.ReLU, "is a type, .*def build"),
        (lambda: None, "is a function, .*def build"),
        (math.inf, "is inf, .*give None, or another value"),
        (np.float32("nan"), "is nan"),
        ("\ud800", "is '.*ud800', which JSON cannot hold"),
        (1j, "is a complex"),
        (b"bytes", "is a bytes"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_argument_that_is_no_plain_value_is_named(given: object, problem: str) -> None:
    """The error names the argument, says what it is, and what to write instead, however deep it stands."""
    with pytest.raises(EmaswapError, match=rf"Linear: argument 'config' {problem}"):
        Architecture.of(Linear, config=given)
    with pytest.raises(EmaswapError, match=rf"argument 'config'\['a'\]\[1\] {problem}"):
        Architecture.of(Linear, config={"a": [0, given]})
    with pytest.raises(ValidationError, match=rf"argument 'config' {problem}"):
        Architecture(factory="a:b", arguments={"config": given})


def test_arguments_have_names() -> None:
    """Positional arguments are refused, and any name is free for an argument of the factory."""
    with pytest.raises(EmaswapError, match="give every argument of Linear by its name"):
        Architecture.of(Linear, 3)
    assert Architecture.of(Linear, factory=1, cls=2).arguments == {"factory": 1, "cls": 2}


def test_arguments_without_end_are_refused() -> None:
    """A list that holds itself is refused like one that is nested too deep."""
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(EmaswapError, match="nested more than 32 deep"):
        Architecture.of(Linear, config=endless)


class Twice(nn.Module):
    """Its name means another class by the time it is used."""


Replaced = Twice


class Twice(nn.Module):  # type: ignore[no-redef]
    """The other class."""


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        (Linear(), r"got an instance: write Architecture\.of\(Linear, \.\.\.\)"),
        ("tests.models:Linear", r"got a string: write Architecture\(factory='tests.models:Linear'"),
        (partial(Linear, inputs=4), r"got something of type partial: write Architecture\.of\(Net, width=32\)"),
        (torch, "something of type module"),
        (3, "something of type int"),
        (lambda: None, r"test_architecture:<lambda>: move it to the top of a module"),
        (Linear.eval, r"Linear\.eval|Module\.eval: move it to the top of a module"),
        (Replaced, r"test_architecture:Twice: there that name refers to Twice"),
    ],
    ids=["an instance", "a string", "a partial", "a package", "a number", "a lambda", "a method", "a replaced class"],
)
def test_what_no_service_could_import_is_refused(factory: object, problem: str) -> None:
    """The error says what was given, and what to write instead."""
    with pytest.raises(EmaswapError, match=problem):
        Architecture.of(factory)


# -- weights into a module -----------------------------------------------------------------------------------------


def test_a_module_is_filled_with_copies() -> None:
    """After filling, the module has the weights, and no memory in common with where they came from."""
    module = Linear()
    tensors = {name: torch.randn_like(tensor) for name, tensor in named_tensors(module).items()}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    fill(module, tensors)
    for tensor in tensors.values():
        tensor.zero_()
    torch.testing.assert_close(named_tensors(module), expected, rtol=0, atol=0)


def bent(**changes: Tensor | None) -> dict[str, Tensor]:
    """The tensors of `Everything`, all of them ones; `None` leaves one out."""
    tensors = {name: torch.ones_like(tensor) for name, tensor in named_tensors(Everything()).items()}
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in {**tensors, **named}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "reason", "named"),
    [
        pytest.param(
            bent(steps=None, norm__bias=None), Reason.MISSING_TENSOR, ["steps", "norm.bias"], id="two missing"
        ),
        pytest.param(
            bent(extra=torch.ones(1), more__bias=torch.ones(1)),
            Reason.UNEXPECTED_TENSOR,
            ["extra", "more.bias"],
            id="two unexpected",
        ),
        pytest.param(
            bent(decode__weight=torch.ones(6, 6)),
            Reason.UNEXPECTED_TENSOR,
            ["decode.weight"],
            id="a tied one under its second name",
        ),
        pytest.param(bent(scale=torch.ones(6)), Reason.UNEXPECTED_TENSOR, ["scale"], id="a non-persistent buffer"),
        pytest.param(
            bent(norm__bias=torch.ones(5), norm__weight=torch.ones(1)),
            Reason.WRONG_SHAPE,
            ["norm.bias (expected [6], got [5])", "norm.weight (expected [6], got [1])"],
            id="two of another shape",
        ),
        pytest.param(
            bent(encode__weight=torch.ones(36)),
            Reason.WRONG_SHAPE,
            ["encode.weight (expected [6, 6], got [36])"],
            id="as many numbers in another shape",
        ),
        pytest.param(
            bent(steps=torch.ones(()), norm__bias=torch.ones(6).double()),
            Reason.WRONG_DTYPE,
            ["steps (expected int64, got float32)", "norm.bias (expected float32, got float64)"],
            id="two of another dtype",
        ),
        pytest.param({}, Reason.MISSING_TENSOR, ["encode.weight", "steps"], id="none at all"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(
    tensors: dict[str, Tensor], reason: Reason, named: list[str]
) -> None:
    """Every tensor that is wrong is named in the reason, and the module keeps the weights that it had."""
    module = Everything()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(BadVersion) as raised:
        fill(module, tensors)
    assert raised.value.reason == reason
    for problem in named:
        assert problem in raised.value.detail
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


def test_very_many_wrong_tensors_are_counted() -> None:
    """A reason stays short enough to show: twenty names, and how many more there are."""
    with pytest.raises(BadVersion, match="x26 and 80 more") as raised:
        fill(nn.ReLU(), {f"x{i}": torch.ones(1) for i in range(100)})
    assert raised.value.detail.count(",") == 19


def test_an_average_comes_out_of_a_file_to_the_last_bit() -> None:
    """Tied weights, integer buffers and non-persistent buffers are right: the rebuilt module answers like the average."""
    torch.manual_seed(0)
    model = Everything(width=5)
    ema = ModelEMA(model, decay=Constant(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    file = io.BytesIO()
    blob = write(file, named_tensors(ema.ema))
    file.seek(0)

    module = build(Architecture.of(Everything, width=5), trusted=["tests.models.*"])
    fill(module, read(file, blob).tensors)
    assert isinstance(module, Everything)
    assert module.encode.weight is module.decode.weight
    assert module.steps.item() == 5
    assert module.norm.num_batches_tracked is not None
    assert module.norm.num_batches_tracked.item() == 5
    rows = torch.randn(16, 5)
    with torch.no_grad():
        assert torch.equal(module(rows), ema.ema(rows))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_a_module_in_half_precision_is_widened_by_what_it_is_filled_with(
    narrow: torch.dtype, wide: torch.dtype
) -> None:
    """Weights that were published wide are served wide: buffers follow, integers and ties stay as they are."""
    module = Everything().to(narrow)
    tensors = named_tensors(Everything().to(wide))
    fill(module, tensors)
    torch.testing.assert_close(named_tensors(module), tensors, rtol=0, atol=0)
    assert module.scale.dtype == wide
    assert module.steps.dtype == torch.int64
    assert module.encode.weight is module.decode.weight
    with torch.no_grad():
        assert module.eval()(torch.ones(2, 6, dtype=wide)).dtype == wide


def test_numbers_that_are_not_finite_are_filled_as_they_are() -> None:
    """Filling judges names, shapes and dtypes; whether values are finite is judged elsewhere."""
    module = nn.Linear(1, 1, bias=False)
    fill(module, {"weight": torch.tensor([[math.inf]])})
    assert module.weight.item() == math.inf


# -- bounds --------------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """A layer of some width beside a buffer that is no state; counts how often it is made, and where."""

    made: ClassVar[list[str]] = []

    def __init__(self, width: int = 1, beside: int = 0) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.register_buffer("beside", torch.zeros(beside), persistent=False)
        self.made.append(self.layer.weight.device.type)


@pytest.fixture
def made() -> list[str]:
    """Where modules were made since the test began."""
    Counted.made.clear()
    return Counted.made


def counted(width: int, beside: int = 0) -> Architecture:
    """The architecture of a `Counted`."""
    return Architecture.of(Counted, width=width, beside=beside)


TRUSTED = ("tests.versions.*",)
MANY = 1 << 21  # a layer of so many by so many float32 takes 16 TiB


def weights(width: int) -> dict[str, Tensor]:
    """Weights of a `Counted`, of any size, in the memory of one number."""
    return {"layer.weight": torch.zeros(1).expand(width, width), "layer.bias": torch.zeros(1).expand(width)}


def test_a_factory_of_the_expected_size_runs_once(made: list[str]) -> None:
    """As all factories did before there were bounds: on the CPU, and never on the meta device."""
    module = build(counted(8), trusted=TRUSTED, like=weights(8))
    fill(module, weights(8))
    assert made == ["cpu"]


def test_a_factory_that_would_make_a_giant_is_refused_for_its_shapes(made: list[str]) -> None:
    """Nothing of it is allocated: the tensors are compared where they take no memory."""
    with pytest.raises(BadVersion, match=r"layer\.weight \(expected \[2097152, 2097152\], got \[8, 8\]\)") as raised:
        build(counted(MANY), trusted=TRUSTED, like=weights(8))
    assert raised.value.reason is Reason.WRONG_SHAPE
    assert made == ["meta"]


def test_a_giant_that_the_weights_are_of_is_short_of_memory(made: list[str]) -> None:
    """It is no fault of the version's."""
    with pytest.raises(Short, match="one tensor of the module takes 16384.0 GiB of memory"):
        build(counted(MANY), trusted=TRUSTED, like=weights(MANY))
    with pytest.raises(Short, match="one tensor of the module"):
        build(counted(MANY), trusted=TRUSTED)
    assert made == []


def test_much_that_is_no_state_is_built_all_the_same(made: list[str]) -> None:
    """A module that takes more than its weights, and fits, is compared first, and then built."""
    module = build(counted(8, beside=40 << 20), trusted=TRUSTED, like=weights(8))
    assert module.get_buffer("beside").device.type == "cpu"
    assert made == ["meta", "cpu"]


def test_a_factory_that_swallows_errors_is_bounded_too(made: list[str]) -> None:
    """What it made instead is not taken for the module."""
    with pytest.raises(BadVersion) as raised:
        build(Architecture.of(swallowing), trusted=TRUSTED, like=weights(8))
    assert raised.value.reason is Reason.WRONG_SHAPE
    assert made == ["meta"]


def swallowing() -> nn.Module:
    """Make a giant, or something small where that fails."""
    try:
        return Counted(MANY)
    except MemoryError:
        return Counted(8)


class _KeepsAView(nn.Module):
    """A layer that computes with a view of its weight, which is no state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2))
        self.turned = self.weight.detach().t()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.turned


def _channels_last(layer: nn.Conv2d) -> nn.Conv2d:
    layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)
    return layer


def _addresses(module: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in named_tensors(module).items()}


def test_a_module_adopts_the_memory_of_what_it_is_filled_with() -> None:
    """Nothing is copied, tied tensors stay tied, and the answers are those of a copy."""
    given = {name: tensor.clone() for name, tensor in named_tensors(Everything()).items()}
    module, copy = Everything().eval(), Everything().eval()
    fill(module, given, adopt=True)
    fill(copy, given)
    assert _addresses(module) == {name: tensor.data_ptr() for name, tensor in given.items()}
    assert len(list(module.parameters())) == len(list(copy.parameters()))
    for name, tensor in named_tensors(copy).items():
        assert torch.equal(named_tensors(module)[name], tensor)


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (_KeepsAView(), {"weight": torch.randn(3, 2)}),
        (nn.Linear(3, 2, bias=False).double(), {"weight": torch.randn(2, 3).bfloat16()}),
        (_channels_last(nn.Conv2d(3, 4, 3, bias=False)), {"weight": torch.randn(4, 3, 3, 3)}),
        (nn.Linear(3, 2, bias=False), {"weight": torch.randn(3, 2).t()}),
    ],
    ids=["a view is kept", "another dtype", "other strides", "given with other strides"],
)
def test_memory_that_would_not_do_is_copied(module: nn.Module, given: dict[str, Tensor]) -> None:
    """What else looks at the module's memory sees the weights, and strides and dtypes stay."""
    before = _addresses(module), [tensor.stride() for tensor in module.parameters()]
    fill(module, given, adopt=True)
    assert (_addresses(module), [tensor.stride() for tensor in module.parameters()]) == before
    assert torch.equal(named_tensors(module)["weight"], given["weight"].to(named_tensors(module)["weight"].dtype))
    if isinstance(module, _KeepsAView):
        x = torch.randn(1, 2)
        assert torch.equal(module(x), x @ given["weight"].t())
