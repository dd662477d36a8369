"""The rehearsal: a model that could never be published is found when the publisher is made, with what to do."""

import itertools
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from emaswap import (
    Architecture,
    DirectoryStore,
    EmaswapError,
    ModelEMA,
    Publisher,
    PublishError,
    Signature,
    TensorField,
    load,
)
from emaswap.publishing.rehearsal import rehearse
from tests.models import Linear, Tokens
from tests.serving import serve

ROWS = torch.linspace(-1, 1, 12).view(4, 3)
HERE = "tests.publishing.test_rehearsal"


class Doing(Linear):
    """Does one thing to its answers, chosen by name."""

    steps: Tensor
    cache: Tensor | None

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.calls = itertools.count(1)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("cache", None, persistent=False)

    def forward(self, rows: Tensor) -> Any:
        return DOINGS[self.what](self, super().forward(rows))


def counted(self: Doing, out: Tensor) -> Tensor:
    """Counts its calls in a buffer."""
    self.steps += 1
    return out


def counted_anew(self: Doing, out: Tensor) -> Tensor:
    """Counts its calls in a buffer, which is another each time."""
    self.steps = self.steps + 1
    return out


def trained(self: Doing, out: Tensor) -> Tensor:
    """Changes its weights."""
    self.layer.weight.mul_(0.5)
    return out


def cached(self: Doing, out: Tensor) -> Tensor:
    """Makes a buffer when it is first called, as rotary embeddings do."""
    if self.cache is None:
        self.cache = torch.ones(2)
    return out * self.cache


class Cache:
    """Something that a module may return beside its answers."""


def differentiated(self: Doing, out: Tensor) -> Tensor:
    """Returns a gradient, as energy models do."""
    with torch.enable_grad():
        rows = out.detach().requires_grad_()
        return torch.autograd.grad(rows.square().sum(), rows)[0]


DOINGS: dict[str, Callable[[Doing, Tensor], object]] = {
    "dropout in forward": lambda self, out: functional.dropout(out, 0.5),
    "noise": lambda self, out: out + torch.randn_like(out),
    "a sample": lambda self, out: torch.multinomial(out.softmax(1), 1),
    "Python's random numbers": lambda self, out: out + random.random(),
    "numpy's random numbers": lambda self, out: out + np.random.rand(),
    "the time": lambda self, out: out + time.perf_counter_ns() % 10**6,
    "the calls so far": lambda self, out: out + next(self.calls),
    "a counter": counted,
    "a new counter": counted_anew,
    "its weights": trained,
    "a cache": cached,
    "a gradient": differentiated,
    "a sparse tensor": lambda self, out: out.to_sparse(),
    "a text": lambda self, out: "text",
    "nothing": lambda self, out: None,
    "lists": lambda self, out: out.tolist(),
    "complex": lambda self, out: out.to(torch.complex64),
    "no numbers": lambda self, out: out[:, :0],
    "one number": lambda self, out: out.mean(),
    "columns": lambda self, out: out.T,
    "a cache beside it": lambda self, out: {"logits": out, "past_key_values": Cache()},
    "four rows alone": lambda self, out: out.view(4, 2) + 0,
    "as many columns as rows": lambda self, out: out @ out.T,
    "the mean of all rows": lambda self, out: out - out.mean(0),
    "with None": lambda self, out: (out, None),
    "double": lambda self, out: out.double(),
}


def publisher_of(store: DirectoryStore, what: str, **options: Any) -> Publisher:
    """A publisher of a network that does this."""
    return Publisher(store, name="test", architecture=Architecture.of(Doing, what=what), **({"probe": ROWS} | options))


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("dropout in forward", "differently each time.*draws random numbers: make dropout depend on self.training"),
        ("noise", "differently each time.*draws random numbers"),
        ("a sample", "differently each time.*sample outside of forward"),
        ("Python's random numbers", "differently each time"),
        ("numpy's random numbers", "differently each time"),
        ("the time", "differently each time.*depends on the time"),
        ("the calls so far", "differently each time.*keeps state between calls"),
        ("a counter", "changes steps in eval mode.*only `if self.training`"),
        ("a new counter", "changes steps in eval mode"),
        ("its weights", r"changes layer\.weight in eval mode"),
        ("a gradient", "does not require grad"),
        ("a sparse tensor", "'output' is torch.sparse_coo, which cannot be served"),
        ("a text", "'output' is a str, expected a tensor"),
        ("nothing", "forward returned None, expected a tensor"),
        ("lists", "is a list, expected a tensor"),
        ("complex", "complex64, which cannot be served"),
        ("no numbers", "rows without numbers"),
        ("one number", r"shape \(\): expected 4 rows"),
        ("columns", r"shape \(2, 4\): expected 4 rows"),
        ("four rows alone", "runs 4 rows but not 1 .*any number of rows"),
        ("as many columns as rows", r"runs 4 rows but not 1 .*expected 1 rows, each float32 of shape \(4\)"),
        ("a cache beside it", "'past_key_values' is a Cache.*Give a Signature that names the outputs"),
    ],
)
def test_a_model_that_could_never_be_published_is_refused_at_once(
    store: DirectoryStore, what: str, problem: str
) -> None:
    """The constructor says what is wrong and what to do, names the factory, and leaves no trace in the store."""
    with pytest.raises(PublishError, match=f"{HERE}:Doing builds cannot be published with this probe: .*{problem}"):
        publisher_of(store, what)
    assert store.versions() == []
    assert store.files.entries("weights") == {}


class Exotic(Linear):
    """Has a buffer that no file can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex128))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"architecture": Linear}, r"expected an architecture, such as Architecture\.of\(Net, width=32\)"),
        ({"architecture": Linear()}, r"expected an architecture"),
        ({"architecture": "Linear"}, r"expected an architecture.*got 'Linear'"),
        (
            {"architecture": f"{HERE}:Exotic"},
            "'phase' has dtype torch.complex128, which a safetensors file cannot hold",
        ),
        ({"name": ""}, "name must be a string of 1 to 200 characters"),
        ({"name": "x" * 201}, "name must be a string of 1 to 200 characters"),
        ({"name": Linear()}, "name must be a string of 1 to 200 characters"),
        ({"dtype": torch.int8}, "dtype=torch.int8: expected one of torch.float32, torch.bfloat16"),
        ({"dtype": torch.float8_e4m3fn}, "dtype=torch.float8_e4m3fn: expected one of"),
        ({"dtype": torch.float64}, "dtype=torch.float64: expected one of"),
        ({"dtype": "bfloat16"}, "dtype=bfloat16: expected one of"),
    ],
    ids=[
        "a class",
        "an instance",
        "a name",
        "a buffer of complex numbers",
        "an empty name",
        "a long name",
        "a model for a name",
        "an integer dtype",
        "a dtype that is too narrow",
        "a dtype that is too wide",
        "a dtype's name",
    ],
)
def test_arguments_that_could_never_work_are_refused_at_once(
    store: DirectoryStore, options: dict[str, Any], problem: str
) -> None:
    """The error says what was expected, and what came."""
    settings: dict[str, Any] = {"name": "test", "architecture": Architecture.of(Linear), "probe": ROWS}
    with pytest.raises(EmaswapError, match=problem):
        Publisher(store, **(settings | options))


def test_a_refused_publisher_makes_no_store(store: DirectoryStore) -> None:
    """The directory is made when everything else is right."""
    elsewhere = DirectoryStore(store.root / "elsewhere")
    with pytest.raises(PublishError):
        publisher_of(elsewhere, "noise")
    assert not elsewhere.root.exists()


def test_answers_that_depend_on_other_rows_are_a_warning(
    store: DirectoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A service runs the rows of several requests together, so that one's answers would depend on another's."""
    publisher_of(store, "the mean of all rows").close()
    assert "output 'output' of a row differs by" in caplog.text


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, partial(torch.autocast, "cpu"), torch.no_grad],
    ids=["inference mode", "autocast", "no gradients"],
)
def test_a_publisher_works_in_whatever_mode_training_is(
    store: DirectoryStore, mode: Callable[[], AbstractContextManager[object]]
) -> None:
    """Modes that the calling thread is in change neither the signature nor the copies."""
    with mode():
        publisher = Publisher(store, name="test", architecture=Architecture.of(Linear), probe=ROWS)
        publisher.publish(Linear())
        publisher.flush()
    for _ in range(3):
        publisher.publish(Linear())
    publisher.close()
    assert publisher.failed == 0
    assert store.manifest(1).signature.outputs[0].dtype == "float32"


@pytest.mark.parametrize("what", ["a cache", "with None"])
def test_what_does_no_harm_is_published(store: DirectoryStore, what: str) -> None:
    """A buffer that is made at the first call, and `None` beside the answer, are no reason to refuse."""
    module = Doing(what).eval()
    with publisher_of(store, what) as publisher:
        publisher.publish(module)
    loaded = load(store, trusted=f"{HERE}:Doing")
    assert isinstance(loaded, Doing)
    assert torch.equal(loaded.layer.weight, module.layer.weight)


def test_named_outputs_are_picked_when_a_signature_names_them(store: DirectoryStore) -> None:
    """With a signature, what is beside the outputs does not matter."""
    signature = Signature(
        inputs=(TensorField(name="rows", shape=(3,)),), outputs=(TensorField(name="logits", shape=(2,)),)
    )
    with publisher_of(store, "a cache beside it", signature=signature) as publisher:
        publisher.publish(Doing("a cache beside it"))
    assert store.versions() == [1]


def test_a_signature_that_has_another_dtype_is_refused_at_once(store: DirectoryStore) -> None:
    """What the outputs are is said before training, not when the first version is rejected."""
    signature = Signature(
        inputs=(TensorField(name="rows", shape=(3,)),), outputs=(TensorField(name="logits", shape=(2,)),)
    )
    with pytest.raises(PublishError, match="the signature says float32, the module returns float64"):
        publisher_of(store, "double", signature=signature)


class Sizeless(nn.Module):
    """Knows its sizes when it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(2)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.layer(rows)
        return out


class Encoder(nn.Module):
    """Takes what a text encoder takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return {"logits": self.layer((input_ids * mask + 10 * kinds).float())}


TOKENS = torch.arange(12).view(4, 3)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize(
    ("factory", "probe", "problem"),
    [
        ("__main__:Net", ROWS, "no service can import __main__:Net: move the class into a module of its own"),
        (f"{HERE}:Sizeless", ROWS, r"layer\.weight.*no shape before the module has run: give the sizes"),
        ("tests.models:Linear", torch.ones(4, 5), "shapes cannot be multiplied"),
        ("tests.models:Tokens", TOKENS, r"Tokens\.forward\(tokens, bias\) also requires 'bias'"),
        (f"{HERE}:Encoder", {"input_ids": TOKENS, "token_type_idz": TOKENS}, "no parameter for 'token_type_idz'"),
        (f"{HERE}:Encoder", {"text": TOKENS}, "no parameter for 'text'"),
        ("tests.models:Linear", torch.ones(0, 3), "no rows, which proves nothing"),
        ("tests.models:Linear", torch.tensor(1.0), "a single number: expected rows"),
        ("tests.models:Linear", [ROWS[0], ROWS[1]], "a list of tensors: give one tensor, rows first"),
        ("tests.models:Linear", (ROWS, ROWS), "a tuple of tensors: .*several inputs by name"),
        ("tests.models:Linear", [[1.0, 2.0], [3.0]], "a list that cannot be made into a tensor"),
        ("tests.models:Linear", "text", "a str that cannot be made into a tensor"),
        ("tests.models:Linear", None, "a NoneType that cannot be made into a tensor"),
        ("tests.models:Linear", ROWS.to_sparse(), "is not a plain tensor"),
        ("tests.models:Linear", ROWS.to("meta"), "is not a plain tensor"),
        ("tests.models:Linear", {}, "got no inputs"),
        (
            "tests.models:Tokens",
            {"tokens": TOKENS, "bias": torch.ones(3)},
            "same number of rows.*'tokens': 4, 'bias': 3",
        ),
        ("tests.models:Linear", ROWS.to(torch.complex64), "complex64|ComplexFloat"),
    ],
)
def test_what_is_no_probe_is_refused_at_once(store: DirectoryStore, factory: str, probe: Any, problem: str) -> None:
    """A factory or probe that cannot be right is refused with what it is and what to give instead."""
    with pytest.raises(PublishError, match=problem):
        Publisher(store, name="test", architecture=factory, probe=probe)


@pytest.mark.parametrize(
    "probe",
    [
        ROWS.tolist(),
        tuple(map(tuple, ROWS.tolist())),
        ROWS.numpy(),
        ROWS.double().numpy(),
        ROWS.double(),
        ROWS.numpy()[::-1],
        ROWS.numpy().astype(">f4"),
        list(ROWS.numpy()),
        ROWS.numpy().T.copy().T,
        ROWS.bfloat16(),
        {"rows": ROWS.tolist()},
        {"rows": ROWS.half().numpy()},
    ],
    ids=[
        "lists",
        "tuples",
        "numpy",
        "numpy in double precision",
        "a tensor in double precision",
        "backwards",
        "of another machine",
        "a list of arrays",
        "columns first in memory",
        "bfloat16",
        "lists by name",
        "half precision by name",
    ],
)
def test_arrays_and_lists_are_converted(probe: Any) -> None:
    """What makes a tensor of rows is one; floating-point numbers get the dtype of the weights if need be."""
    found = rehearse(Architecture.of(Linear), probe)
    (field,) = found.signature.inputs
    assert (field.dtype, field.shape) == ("float32", (3,))
    assert found.inputs[field.name].dtype == torch.float32


def test_a_probe_is_copied(store: DirectoryStore) -> None:
    """What becomes of the caller's array afterwards does not matter."""
    rows = ROWS.numpy().copy()
    with Publisher(store, name="test", architecture=Architecture.of(Linear), probe=rows) as publisher:
        rows[:] = np.nan
        publisher.publish(Linear())
    assert store.versions() == [1]


def test_named_inputs_are_served_as_the_parameters_of_their_names(store: DirectoryStore) -> None:
    """Token types are published and loaded as token types, not as an attention mask."""
    module = Encoder().eval()
    inputs = {"input_ids": TOKENS, "token_type_ids": TOKENS % 2}
    with Publisher(store, name="test", architecture=Architecture.of(Encoder), probe=inputs) as publisher:
        publisher.publish(module)
    loaded = load(store, trusted=f"{HERE}:Encoder")
    answers = store.manifest(1).signature.run(loaded, inputs)["logits"]
    assert torch.equal(answers, module(**inputs)["logits"])
    with serve(store=str(store.root), trust=(f"{HERE}:Encoder",)) as served:
        served.wait_until_live(1)
        # In another order than forward has them.
        names = ("token_type_ids", "input_ids")
        served_answers = served.predict({name: inputs[name].tolist() for name in names}).json()["outputs"]
    torch.testing.assert_close(torch.tensor(served_answers), answers, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "probe",
    [
        {"bias": torch.ones(4), "tokens": TOKENS % 10},
        {"bias": [1.0, 2.0, 3.0, 4.0], "tokens": (TOKENS % 10).tolist()},
    ],
    ids=["tensors", "lists"],
)
def test_inputs_may_be_listed_in_any_order(probe: Mapping[str, Any]) -> None:
    """The signature has the probe's order, and `forward` gets each input by its name."""
    assert [field.name for field in rehearse(Architecture.of(Tokens), probe).signature.inputs] == ["bias", "tokens"]


# -- half precision ------------------------------------------------------------------------------------------------


def linear_in(dtype: str) -> nn.Module:
    """A factory: `Linear` in a dtype."""
    return Linear().to(getattr(torch, dtype))


def averaged(dtype: torch.dtype) -> ModelEMA:
    """The average, in float32, of a network in half precision."""
    model = Linear().to(dtype)
    ema = ModelEMA(model, decay=0.5)
    for _ in range(3):
        with torch.no_grad():
            model.layer.weight.add_(0.001)
        ema.update(model)
    return ema


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("built", "asked", "stored", "served"),
    [
        ("float32", None, "float32", "float32"),
        ("float32", "own", "own", "float32"),
        ("own", None, "own", "own"),
        ("own", "own", "own", "own"),
        ("own", "float32", "float32", "float32"),
    ],
    ids=[
        "built in float32",
        "built in float32 and rounded",
        "built in its own dtype",
        "built and rounded in its own dtype",
        "built in its own dtype and widened",
    ],
)
@pytest.mark.parametrize("probe", ["own", "float32"], ids=["narrow probe", "wide probe"])
def test_a_network_in_half_precision_is_published(
    store: DirectoryStore, dtype: torch.dtype, built: str, asked: str | None, stored: str, served: str, probe: str
) -> None:
    """It is averaged in float32, and stored and served in the factory's dtype or the one that is asked for."""
    own = str(dtype).removeprefix("torch.")
    named = {"own": own, "float32": "float32"}
    ema = averaged(dtype)
    with Publisher(
        store,
        name="test",
        architecture=Architecture.of(linear_in, dtype=named[built]),
        probe=ROWS.to(getattr(torch, named[probe])),
        dtype=getattr(torch, named[asked]) if asked else None,
    ) as publisher:
        publisher.publish(ema)
        publisher.flush()
        publisher.publish(ema)
    manifest = store.manifest(2)
    assert {info.dtype for info in manifest.weights.tensors.values()} == {named[stored]}
    assert manifest.ema.dtype == "float32"
    assert manifest.signature.inputs[0].dtype == manifest.signature.outputs[0].dtype == named[served]
    module = load(store, trusted=f"{HERE}:linear_in")
    assert {parameter.dtype for parameter in module.parameters()} == {getattr(torch, named[served])}
    expected = ema.ema.get_parameter("layer.weight").to(getattr(torch, named[stored]))
    assert torch.equal(module.get_parameter("layer.weight"), expected.to(getattr(torch, named[served])))


class Causal(Linear):
    """Holds a mask of −∞ in a buffer, as a transformer does."""

    mask: Tensor

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1), persistent=persistent)

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows @ self.mask.softmax(-1))


def test_a_mask_of_infinities_that_is_no_state_is_averaged_published_and_served(store: DirectoryStore) -> None:
    """In a buffer that is not persistent it is in nobody's way; in one that is, the publisher says so at once."""
    torch.manual_seed(0)
    model = Causal(persistent=False)
    ema = ModelEMA(model)
    assert ema.update(model) is True
    architecture = Architecture.of(Causal, persistent=False)
    with Publisher(store, name="test", architecture=architecture, probe=ROWS) as publisher:
        publisher.publish(ema)
    with serve(store=str(store.root), trust=(f"{HERE}:Causal",)) as served:
        served.wait_until_live(1)
        answer = served.predict(ROWS.tolist()).json()
    torch.testing.assert_close(torch.tensor(answer["outputs"]), ema(ROWS))
    with pytest.raises(PublishError, match=r"not finite, .* builds a module with such: mask; .*persistent=False"):
        Publisher(store, name="test", architecture=Architecture.of(Causal, persistent=True), probe=ROWS)
