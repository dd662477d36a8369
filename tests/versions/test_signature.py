"""What goes into a model and what comes out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from emaswap import Signature, TensorField
from tests.models import Linear, Tokens

LINEAR = Signature(inputs=(TensorField(name="rows", shape=(3,)),), outputs=(TensorField(name="out", shape=(2,)),))
TOKENS = Signature(
    inputs=(TensorField(name="tokens", dtype="int64", shape=(None,)), TensorField(name="bias")),
    outputs=(TensorField(name="logits", shape=(3,)), TensorField(name="mean", shape=(4,))),
)


class Returns(nn.Module):
    """Hands its rows to a function and returns what that returns."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, rows: Tensor) -> object:
        return self.function(rows)


# -- fields --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "row", "accepted"),
    [
        pytest.param((), (), True, id="a number"),
        pytest.param((3,), (3,), True, id="the size"),
        pytest.param((3,), (4,), False, id="another size"),
        pytest.param((3,), (), False, id="a dimension less"),
        pytest.param((3,), (1, 3), False, id="a dimension more"),
        pytest.param((None,), (7,), True, id="any size"),
        pytest.param((None,), (0,), True, id="any size, none"),
        pytest.param((None, 2), (7, 2), True, id="one size of two varies"),
        pytest.param((None, 2), (2, 7), False, id="the other size varies"),
        pytest.param((0,), (0,), True, id="a size of zero"),
    ],
)
def test_a_row_fits_a_field_or_not(shape: tuple[int | None, ...], row: tuple[int, ...], accepted: bool) -> None:
    """A row has as many dimensions as the field, each of its size unless that may vary."""
    assert TensorField(name="x", shape=shape).accepts(row) is accepted


@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.data())
def test_a_size_that_may_vary_accepts_all_that_a_fixed_one_does(row: tuple[int, ...], data: st.DataObject) -> None:
    """Opening any of a field's sizes loses no row."""
    opened = tuple(None if data.draw(st.booleans()) else size for size in row)
    assert TensorField(name="x", shape=row).accepts(row)
    assert TensorField(name="x", shape=opened).accepts(row)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        pytest.param(TensorField(name="x"), "float32 of shape ()", id="a number"),
        pytest.param(TensorField(name="x", dtype="int64", shape=(None, 3)), "int64 of shape (any, 3)", id="any size"),
    ],
)
def test_a_field_reads_as_text(field: TensorField, text: str) -> None:
    """A field in an error message shows its dtype and sizes."""
    assert str(field) == text


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("bool", torch.bool)]
)
def test_a_field_knows_its_dtype(dtype: Any, expected: torch.dtype) -> None:
    """The dtype's name in a field is torch's."""
    assert TensorField(name="x", dtype=dtype).torch_dtype == expected


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"name": ""}, id="empty name"),
        pytest.param({"name": "x" * 201}, id="long name"),
        pytest.param({"dtype": "complex64"}, id="unknown dtype"),
        pytest.param({"dtype": "torch.float32"}, id="a dtype with its module"),
        pytest.param({"shape": [-1]}, id="negative size"),
        pytest.param({"shape": [1.5]}, id="half a size"),
    ],
)
def test_a_field_that_means_nothing_is_refused(wrong: dict[str, Any]) -> None:
    """Names are not empty, dtypes are known, sizes are whole and not negative."""
    with pytest.raises(ValidationError):
        TensorField.model_validate({"name": "x", **wrong})


# -- signatures ----------------------------------------------------------------------------------------------------


def test_a_signature_is_frozen() -> None:
    """A signature cannot be changed, nor can a field of it."""
    with pytest.raises(ValidationError, match="frozen"):
        LINEAR.labels = ("a", "b")  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        LINEAR.inputs[0].name = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("inputs", "outputs", "problem"),
    [
        pytest.param((), ("y",), "inputs", id="no inputs"),
        pytest.param(("x",), (), "outputs", id="no outputs"),
        pytest.param(("x", "x"), ("y",), "two inputs have the same name", id="inputs of one name"),
        pytest.param(("x",), ("y", "y"), "two outputs have the same name", id="outputs of one name"),
    ],
)
def test_fields_are_there_and_have_names_of_their_own(
    inputs: tuple[str, ...], outputs: tuple[str, ...], problem: str
) -> None:
    """There is at least one input and one output, and no two of either share a name."""
    with pytest.raises(ValidationError, match=problem):
        Signature(
            inputs=tuple(TensorField(name=name) for name in inputs),
            outputs=tuple(TensorField(name=name) for name in outputs),
        )


@pytest.mark.parametrize(
    ("shapes", "fits"),
    [
        pytest.param([(2,)], True, id="a vector of as many logits"),
        pytest.param([(None,)], True, id="a vector of any size"),
        pytest.param([(3,)], False, id="a vector of another size"),
        pytest.param([()], False, id="a number"),
        pytest.param([(2, 2)], False, id="a matrix"),
        pytest.param([(2,), (2,)], False, id="two outputs"),
    ],
)
def test_labels_name_the_entries_of_the_one_output(shapes: list[tuple[int | None, ...]], fits: bool) -> None:
    """Labels come with one output, a vector of as many logits as there are labels."""
    outputs = tuple(TensorField(name=f"out{i}", shape=shape) for i, shape in enumerate(shapes))
    if fits:
        assert Signature(inputs=LINEAR.inputs, outputs=outputs, labels=("a", "b")).labels == ("a", "b")
    else:
        with pytest.raises(ValidationError, match="2 labels need one output"):
            Signature(inputs=LINEAR.inputs, outputs=outputs, labels=("a", "b"))


@pytest.mark.parametrize(
    ("outputs", "labels", "problem"),
    [
        pytest.param([{"name": "y", "shape": [0]}], None, "rows without numbers", id="an output of no numbers"),
        pytest.param([{"name": "y", "shape": [3, 0]}], None, "rows without numbers", id="none in one of two sizes"),
        pytest.param([{"name": "y", "shape": [None]}], (), "at least 1", id="no label"),
        pytest.param([{"name": "y", "dtype": "complex64"}], None, "dtype", id="complex"),
        pytest.param([{"name": "y", "shape": [1 << 50]}], None, "less than or equal", id="a size out of range"),
        pytest.param([{"name": "y", "shape": [1 << 30, 1 << 30]}], None, "a row has at most", id="sizes that overflow"),
        pytest.param([{"name": "y", "shape": [1] * 33}], None, "at most 32", id="too many dimensions"),
    ],
)
def test_a_signature_that_nobody_could_answer_with_is_refused(
    outputs: list[dict[str, object]], labels: tuple[str, ...] | None, problem: str
) -> None:
    """A manifest with such outputs is invalid."""
    with pytest.raises(ValidationError, match=problem):
        Signature.model_validate({"inputs": [{"name": "x"}], "outputs": outputs, "labels": labels})


# -- inferring one -------------------------------------------------------------------------------------------------


def test_a_batch_shows_the_signature() -> None:
    """Inputs and outputs of an example batch give names, dtypes and fixed sizes, without the batch dimension."""
    signature = Signature.infer(Linear(), torch.zeros(5, 3), labels=("a", "b"))
    assert signature.inputs == (TensorField(name="input", dtype="float32", shape=(3,)),)
    assert signature.outputs == (TensorField(name="output", dtype="float32", shape=(2,)),)
    assert signature.labels == ("a", "b")


def test_named_inputs_and_outputs_keep_their_names_and_order() -> None:
    """Several inputs by name show a signature in forward's order, with the names of the outputs."""
    signature = Signature.infer(Tokens(), {"tokens": torch.zeros(2, 5, dtype=torch.int64), "bias": torch.zeros(2)})
    assert [(field.name, str(field)) for field in signature.inputs] == [
        ("tokens", "int64 of shape (5)"),
        ("bias", "float32 of shape ()"),
    ]
    assert [field.name for field in signature.outputs] == ["logits", "mean"]


def test_outputs_without_names_are_numbered() -> None:
    """A tuple of outputs gets names to tell them apart."""
    signature = Signature.infer(Returns(lambda rows: (rows, rows.sum(dim=1))), torch.zeros(2, 3))
    assert [(field.name, field.shape) for field in signature.outputs] == [("output", (3,)), ("output_1", ())]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_inferring_runs_the_module_in_eval_mode_and_leaves_it_as_it_was(training: bool) -> None:
    """A look at a batch moves no running statistics, makes no history, and gives the module's mode back."""
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).train(training)
    Signature.infer(module, torch.ones(4, 3))
    assert module.training is training
    assert module.state_dict()["0.num_batches_tracked"] == 0


def test_inferring_leaves_every_submodule_in_its_mode() -> None:
    """A part that the user froze in eval mode is still in eval mode after the look at a batch."""
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    module[0].eval()
    Signature.infer(module, torch.ones(4, 3))
    assert [part.training for part in module.modules()] == [True, False, True]


def test_the_mode_comes_back_when_the_module_raises() -> None:
    """A module that cannot run its batch is left in the mode that it was in, too."""
    module = Linear().train()
    with pytest.raises(RuntimeError):
        Signature.infer(module, torch.ones(4, 5))
    assert module.training


@pytest.mark.parametrize(
    "returned",
    [
        pytest.param("text", id="a text"),
        pytest.param(None, id="nothing"),
        pytest.param({"a": 1.0}, id="a number by name"),
        pytest.param({}, id="an empty mapping"),
        pytest.param((), id="an empty tuple"),
        pytest.param(torch.zeros(2, 3, dtype=torch.complex64), id="a dtype that no field has"),
    ],
)
def test_a_module_that_returns_no_tensors_has_no_signature(returned: object) -> None:
    """What cannot be answered with is refused when the signature is inferred."""
    with pytest.raises((ValueError, TypeError)):
        Signature.infer(Returns(lambda _: returned), torch.zeros(2, 3))


# -- a batch in ----------------------------------------------------------------------------------------------------


def test_one_tensor_goes_by_the_name_of_the_first_input() -> None:
    """A model of one input takes a plain tensor, or the same by name."""
    rows = torch.zeros(4, 3)
    assert LINEAR.name_inputs(rows)["rows"] is rows
    assert LINEAR.name_inputs({"rows": rows})["rows"] is rows


def test_inputs_are_put_in_the_signatures_order() -> None:
    """However a mapping is ordered, `forward` gets its inputs in the signature's order."""
    named = TOKENS.name_inputs({"bias": torch.zeros(2), "tokens": torch.zeros(2, 9, dtype=torch.int64)})
    assert list(named) == ["tokens", "bias"]


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        pytest.param({"x": torch.zeros(4, 3)}, r"expected inputs \['rows'\], got \['x'\]", id="another name"),
        pytest.param({}, r"expected inputs \['rows'\], got \[\]", id="no inputs"),
        pytest.param({"rows": torch.zeros(4, 3), "x": torch.zeros(4)}, "expected inputs", id="one too many"),
        pytest.param(torch.zeros(4, 2), r"float32 of shape \(3\), got float32 of shape \(4, 2\)", id="another size"),
        pytest.param(torch.zeros(3), r"got float32 of shape \(3,\)", id="a row without a batch"),
        pytest.param(torch.tensor(0.0), r"got float32 of shape \(\)", id="a number"),
        pytest.param(torch.zeros(4, 3).double(), r"got float64 of shape \(4, 3\)", id="another dtype"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(inputs: Tensor | dict[str, Tensor], problem: str) -> None:
    """Names, dtypes and shapes that do not fit are refused with what was expected and what came."""
    with pytest.raises(ValueError, match=problem):
        LINEAR.name_inputs(inputs)


def test_a_tensor_alone_is_not_enough_for_two_inputs() -> None:
    """A plain tensor does not stand for several inputs."""
    with pytest.raises(ValueError, match="expected inputs"):
        TOKENS.name_inputs(torch.zeros(2, 5, dtype=torch.int64))


# -- a batch out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7])
def test_rows_of_any_size_run_where_the_size_may_vary(length: int) -> None:
    """One signature runs batches of different sizes, and gives its outputs by name."""
    module = Tokens().eval()
    inputs = {"tokens": torch.ones(2, length, dtype=torch.int64), "bias": torch.zeros(2)}
    outputs = TOKENS.run(module, inputs)
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {"logits": (2, 3), "mean": (2, 4)}
    assert not any(output.requires_grad for output in outputs.values())


@pytest.mark.parametrize(
    "returned",
    [
        pytest.param(lambda rows: [rows[:, :2]], id="a list of one"),
        pytest.param(lambda rows: (rows[:, :2],), id="a tuple of one"),
        pytest.param(lambda rows: {"out": rows[:, :2], "more": None}, id="a mapping with more in it"),
    ],
)
def test_outputs_come_as_a_tensor_a_sequence_or_a_mapping(returned: Callable[[Tensor], object]) -> None:
    """However a module hands back its outputs, they go by the signature's names."""
    rows = torch.arange(6.0).view(2, 3)
    outputs = LINEAR.run(Returns(returned), {"rows": rows})
    assert list(outputs) == ["out"]
    assert outputs["out"].tolist() == [[0, 1], [3, 4]]


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        pytest.param(lambda rows: rows, r"'out': expected 4 rows, each float32 of shape \(2\)", id="another size"),
        pytest.param(lambda rows: rows[:1, :2], r"expected 4 rows, .* got shape \(1, 2\)", id="a row for all"),
        pytest.param(lambda rows: rows.sum(), r"got shape \(\)", id="one number for all"),
        pytest.param(lambda rows: (rows, rows), "returned 2 outputs, the signature has 1", id="one too many"),
        pytest.param(lambda rows: (), "returned 0 outputs, the signature has 1", id="none"),
        pytest.param(
            lambda rows: {"other": rows}, r"'out' cannot be picked from 'other' \(float32 of shape", id="another name"
        ),
        pytest.param(lambda rows: None, "returned 0 outputs, the signature has 1", id="nothing"),
        pytest.param(lambda rows: rows.tolist(), "returned 4 outputs", id="lists of numbers"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(returned: Callable[[Tensor], object], problem: str) -> None:
    """A module that does not return one row for each row, as the signature has it, raises and says what came."""
    with pytest.raises((ValueError, TypeError), match=problem):
        LINEAR.run(Returns(returned), {"rows": torch.zeros(4, 3)})
