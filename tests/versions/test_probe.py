"""The probe: recorded when a version is published, replayed by whoever loads it."""

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from emaswap import BadVersion, EmaswapError, Reason, Signature, TensorField
from emaswap.files.tensor_file import read, write
from emaswap.versions.probe import Probe, drift, tolerances
from tests.models import Linear, Tokens

ROWS = torch.linspace(-1, 1, 12).view(4, 3)
SIGNATURE = Signature(
    inputs=(TensorField(name="rows", shape=(3,)),),
    outputs=(TensorField(name="sum"), TensorField(name="twice", shape=(3,))),
)
EXACT = {"rtol": 0.0, "atol": 0.0}


class Sums(nn.Module):
    """Two outputs of one input: the sum of a row, and twice the row; or whatever a function makes of these."""

    def __init__(self, then: Callable[[dict[str, Tensor]], object] | None = None) -> None:
        super().__init__()
        self.then = then

    def forward(self, rows: Tensor) -> object:
        outputs = {"sum": rows.sum(dim=1), "twice": 2 * rows}
        return self.then(outputs) if self.then else outputs


@pytest.fixture
def probe() -> Probe:
    """What `Sums` answers to four rows."""
    return Probe.record(Sums(), SIGNATURE, ROWS)


def reason_for(probe: Probe, module: nn.Module) -> Reason:
    """Why a module that does not answer as recorded is refused."""
    with pytest.raises(BadVersion) as raised:
        probe.compare(probe.replay(module, SIGNATURE), **EXACT)
    return raised.value.reason


# -- recording -----------------------------------------------------------------------------------------------------


def test_a_probe_holds_inputs_and_answers_by_name(probe: Probe) -> None:
    """Recording keeps what went in and what came out, under the signature's names."""
    assert torch.equal(probe.inputs["rows"], ROWS)
    assert torch.equal(probe.outputs["sum"], ROWS.sum(dim=1))
    assert torch.equal(probe.outputs["twice"], 2 * ROWS)


def test_recorded_answers_have_no_history() -> None:
    """A module that still trains is recorded without its graph."""
    signature = Signature.infer(Linear(), ROWS)
    assert not Probe.record(Linear().train(), signature, ROWS).outputs["output"].requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_answer_that_is_not_finite_is_no_proof(value: float) -> None:
    """A model that answers its own probe with NaN or infinity is not recorded, and the output is named."""
    module = Sums(lambda outputs: {**outputs, "sum": outputs["sum"] * 0 + value})
    with pytest.raises(EmaswapError, match="not finite: sum"):
        Probe.record(module, SIGNATURE, ROWS)


def test_an_input_that_does_not_fit_is_not_recorded() -> None:
    """A probe is made of inputs that the signature allows."""
    with pytest.raises(ValueError, match="expected a batch of rows"):
        Probe.record(Sums(), SIGNATURE, ROWS[:, :2])


def test_a_probe_without_rows_is_no_proof() -> None:
    """A probe of no rows would be passed by any weights at all: it is refused."""
    with pytest.raises((EmaswapError, ValueError), match="row"):
        Probe.record(Sums(), SIGNATURE, ROWS[:0])


class InPlace(nn.Module):
    """A module that begins by working in its input's memory, as `nn.ReLU(inplace=True)` does."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows += 1
        return rows.sum(dim=1), 2 * rows


def test_a_module_that_writes_into_its_input_is_recorded_right() -> None:
    """The probe has the inputs as they were given, the caller's own tensor is unharmed, and every replay agrees."""
    rows = ROWS.clone()
    probe = Probe.record(InPlace(), SIGNATURE, rows)
    assert torch.equal(rows, ROWS)
    assert torch.equal(probe.inputs["rows"], ROWS)
    for _ in range(2):
        probe.compare(probe.replay(InPlace(), SIGNATURE), **EXACT)


# -- travelling ----------------------------------------------------------------------------------------------------


def test_a_probe_travels_in_a_tensor_file() -> None:
    """What is recorded comes back out of a file, several inputs and outputs of any dtype, and proves the module."""
    module = Tokens().eval()
    inputs = {"tokens": torch.randint(0, 10, (2, 5)), "bias": torch.zeros(2)}
    signature = Signature.infer(module, inputs)
    file = io.BytesIO()
    blob = write(file, Probe.record(module, signature, inputs).to_tensors())
    file.seek(0)
    probe = Probe.from_tensors(read(file, blob).tensors)
    assert probe.inputs.keys() == {"tokens", "bias"}
    probe.compare(probe.replay(copy.deepcopy(module), signature), **EXACT)


def test_an_input_and_an_output_may_share_a_name() -> None:
    """Inputs and outputs are kept apart, and names with a slash in them come back whole."""
    probe = Probe({"x": torch.zeros(1), "input/y": torch.ones(1)}, {"x": torch.ones(1), "output/x": torch.zeros(1)})
    again = Probe.from_tensors(probe.to_tensors())
    assert again.inputs == probe.inputs
    assert again.outputs == probe.outputs


# -- replaying -----------------------------------------------------------------------------------------------------


def test_the_same_module_answers_the_same(probe: Probe) -> None:
    """The weights that were recorded pass, without any tolerance."""
    probe.compare(probe.replay(Sums(), SIGNATURE), **EXACT)


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        pytest.param(lambda o: {**o, "sum": o["sum"] + 1e-3}, Reason.PROBE_MISMATCH, id="another answer"),
        pytest.param(lambda o: {**o, "sum": o["sum"] + math.nan}, Reason.PROBE_MISMATCH, id="NaN"),
        pytest.param(lambda o: {**o, "sum": o["sum"] + math.inf}, Reason.PROBE_MISMATCH, id="infinity"),
        pytest.param(lambda o: {**o, "sum": o["sum"].flip(0)}, Reason.PROBE_MISMATCH, id="rows in another order"),
        pytest.param(lambda o: {**o, "sum": o["sum"].double()}, Reason.PROBE_MISMATCH, id="another dtype"),
        pytest.param(lambda o: {"twice": o["twice"]}, Reason.PROBE_FAILED, id="an output missing"),
        pytest.param(lambda o: o["sum"], Reason.PROBE_FAILED, id="one output of two"),
        pytest.param(lambda o: {**o, "twice": o["twice"][:, :2]}, Reason.PROBE_FAILED, id="another shape"),
        pytest.param(lambda o: {**o, "sum": o["sum"][:1]}, Reason.PROBE_FAILED, id="fewer rows"),
        pytest.param(lambda o: o["missing"], Reason.PROBE_FAILED, id="it raises"),
        pytest.param(lambda o: "text", Reason.PROBE_FAILED, id="a text"),
    ],
)
def test_a_module_that_answers_otherwise_is_refused(
    probe: Probe, then: Callable[[dict[str, Tensor]], object], reason: Reason
) -> None:
    """Whatever differs from the recorded answers, the version is refused, and nothing else is raised."""
    assert reason_for(probe, Sums(then)) == reason


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({}, id="no inputs"),
        pytest.param({"x": ROWS}, id="another name"),
        pytest.param({"rows": ROWS[0]}, id="a row without a batch"),
        pytest.param({"rows": ROWS.double()}, id="another dtype"),
    ],
)
def test_a_probe_that_does_not_fit_the_signature_is_refused(probe: Probe, inputs: dict[str, Tensor]) -> None:
    """A probe file that is not of its manifest's signature fails, and nothing else is raised."""
    assert reason_for(Probe(inputs, probe.outputs), Sums()) == Reason.PROBE_FAILED


# -- comparing -----------------------------------------------------------------------------------------------------


def test_a_mismatch_is_told_in_figures() -> None:
    """The reason names the output, the largest difference, and what was allowed."""
    probe = Probe({}, {"logits": torch.tensor([1.0, 2.0])})
    with pytest.raises(BadVersion, match=r"'logits' .* by up to 0\.5 \(allowed: 1e-05 \+ 0\.0001 × \|recorded\|\)"):
        probe.compare({"logits": torch.tensor([1.0, 2.5])}, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("recorded", "replayed", "rtol", "atol", "passes"),
    [
        pytest.param(0.0, 0.01, 0.0, 0.0101, True, id="within atol"),
        pytest.param(0.0, 0.01, 0.0, 0.0099, False, id="beyond atol"),
        pytest.param(100.0, 101.0, 0.0101, 0.0, True, id="within rtol"),
        pytest.param(100.0, 101.0, 0.0099, 0.0, False, id="beyond rtol"),
        pytest.param(-100.0, -101.0, 0.005, 0.51, True, id="within both together"),
        pytest.param(0.0, 0.01, 1.0, 0.0, False, id="rtol of nothing is nothing"),
        pytest.param(0.0, 100.0, 1.0, 0.0, False, id="relative to what was recorded"),
        pytest.param(1.0, math.nan, 1.0, 1.0, False, id="NaN"),
        pytest.param(1.0, math.inf, 1.0, 1.0, False, id="infinity"),
    ],
)
def test_a_difference_is_measured_against_what_was_recorded(
    recorded: float, replayed: float, rtol: float, atol: float, passes: bool
) -> None:
    """An answer passes when |replayed - recorded| is at most atol + rtol·|recorded|."""
    probe = Probe({}, {"y": torch.tensor([recorded])})
    outputs = {"y": torch.tensor([replayed])}
    if passes:
        probe.compare(outputs, rtol=rtol, atol=atol)
    else:
        with pytest.raises(BadVersion) as raised:
            probe.compare(outputs, rtol=rtol, atol=atol)
        assert raised.value.reason == Reason.PROBE_MISMATCH


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8], ids=["int64", "bool", "uint8"])
def test_whole_numbers_are_compared_exactly(dtype: torch.dtype) -> None:
    """Answers that are classes or flags must be the very ones."""
    probe = Probe({}, {"y": torch.tensor([0, 1], dtype=dtype)})
    probe.compare({"y": torch.tensor([0, 1], dtype=dtype)}, **EXACT)
    with pytest.raises(BadVersion):
        probe.compare({"y": torch.tensor([1, 1], dtype=dtype)}, **EXACT)


@pytest.mark.parametrize("names", [[], ["a"], ["a", "b", "c"]], ids=["none", "one less", "one more"])
def test_outputs_are_compared_by_name(names: list[str]) -> None:
    """As many outputs come back as were recorded, and both lists are told when not."""
    probe = Probe({}, {"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(BadVersion, match=r"recorded outputs \['a', 'b'\], replayed") as raised:
        probe.compare({name: torch.zeros(1) for name in names}, **EXACT)
    assert raised.value.reason == Reason.PROBE_FAILED


def test_an_answer_of_another_shape_does_not_pass_by_broadcasting() -> None:
    """One answer for all rows is not an answer for each row."""
    probe = Probe({}, {"y": torch.zeros(4)})
    with pytest.raises(BadVersion, match=r"recorded torch.float32\[4\], replayed torch.float32\[1\]"):
        probe.compare({"y": torch.zeros(1)}, **EXACT)


# -- tolerances ----------------------------------------------------------------------------------------------------

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def of(*dtypes: torch.dtype) -> dict[str, Tensor]:
    """One tensor of each dtype."""
    return {str(dtype): torch.zeros(1, dtype=dtype) for dtype in dtypes}


def test_tolerances_widen_with_coarser_dtypes() -> None:
    """The fewer bits a dtype keeps, the more room its answers get; fp32 on a CPU gets 1e-4 at most."""
    rtols, atols = zip(
        *(tolerances(of(d), CPU) for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)), strict=True
    )
    assert list(rtols) == sorted(rtols)
    assert list(atols) == sorted(atols)
    assert rtols[1] <= 1e-4


def test_the_coarsest_dtype_decides() -> None:
    """A model of several dtypes gets the room of the coarsest; integers ask for none."""
    assert tolerances(of(torch.float32, torch.bfloat16, torch.int64), CPU) == tolerances(of(torch.bfloat16), CPU)
    assert tolerances(of(torch.float32, torch.int64), CPU) == tolerances(of(torch.float32), CPU)


@pytest.mark.parametrize("tensors", [{}, of(torch.int64)], ids=["no weights", "whole numbers"])
def test_whole_numbers_get_no_room(tensors: dict[str, Tensor]) -> None:
    """A model without floating-point weights answers exactly."""
    assert tolerances(tensors, CPU) == (0, 0)


def test_another_device_gets_more_room_but_never_less() -> None:
    """On a GPU fp32 may be computed in TF32, so it gets more room; what has enough room keeps it."""
    assert tolerances(of(torch.float32), GPU) > tolerances(of(torch.float32), CPU)
    assert tolerances(of(torch.bfloat16), GPU) == tolerances(of(torch.bfloat16), CPU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_another_order_of_summing_is_within_the_tolerances(dtype: torch.dtype) -> None:
    """A model whose sums are taken in another order still passes; one with a weight that is 1 % off does not."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 8)).to(dtype)
    rows = torch.randn(16, 256, dtype=dtype)
    signature = Signature.infer(module, rows)
    probe = Probe.record(module, signature, rows)
    rtol, atol = tolerances(dict(module.state_dict()), CPU)

    order = torch.randperm(256)
    other = copy.deepcopy(module)
    mine, theirs = other.state_dict(), module.state_dict()
    mine["0.weight"].copy_(theirs["0.weight"][order])
    mine["0.bias"].copy_(theirs["0.bias"][order])
    mine["2.weight"].copy_(theirs["2.weight"][:, order])
    probe.compare(probe.replay(other, signature), rtol=rtol, atol=atol)

    mine["2.weight"][0, 0].mul_(1.01)
    with pytest.raises(BadVersion):
        probe.compare(probe.replay(other, signature), rtol=rtol, atol=atol)


# -- drift ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "others", "expected"),
    [
        pytest.param({"y": [1.0, 2.0]}, {"y": [1.0, 2.0]}, 0.0, id="the same"),
        pytest.param({"y": [1.0, 2.0]}, {"y": [2.0, 0.0]}, 1.5, id="both ways"),
        pytest.param({"y": [0.0], "z": [0.0, 0.0, 0.0]}, {"y": [4.0], "z": [0.0, 0.0, 0.0]}, 1.0, id="over all"),
        pytest.param({"y": [1.0], "a": [9.0]}, {"y": [3.0], "b": [9.0]}, 2.0, id="common names only"),
        pytest.param({"a": [1.0]}, {"b": [3.0]}, 0.0, id="nothing in common"),
        pytest.param({"y": [1.0]}, {"y": [1.0, 3.0]}, 0.0, id="shapes that cannot be compared"),
        pytest.param({"y": []}, {"y": []}, 0.0, id="no numbers"),
        pytest.param({}, {}, 0.0, id="no outputs"),
    ],
)
def test_drift_is_the_mean_difference(
    outputs: dict[str, list[float]], others: dict[str, list[float]], expected: float
) -> None:
    """How far answers move is the mean absolute difference over all numbers that both have."""
    first, second = ({name: torch.tensor(y) for name, y in side.items()} for side in (outputs, others))
    assert drift(first, second) == pytest.approx(expected)
    assert drift(second, first) == pytest.approx(expected)


def test_drift_is_measured_between_dtypes() -> None:
    """A new version may answer in another dtype, and whole numbers drift, too."""
    assert drift({"y": torch.tensor([1, 2])}, {"y": torch.tensor([1.5, 2.5]).half()}) == pytest.approx(0.5)
