"""In which numbers, how many parts and with which algorithms training computes, and that the right weights come of it."""

import copy
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from emaswap import Architecture
from tests.hard_tasks import OVERFLOWS, Overflowing, Plain, PlainNet
from tests.training import NOISY, SHORT, STEPS, Trainer, newest, weights_of
from trainer.__main__ import main
from trainer.distributed import Ranks
from trainer.learner import Learner
from trainer.learning_rate import warmup_and_constant, warmup_and_cosine
from trainer.precision import Precision, set_deterministic, set_float32
from trainer.settings import TrainerSettings
from trainer.tasks import Task

CPU = torch.device("cpu")
PLAIN = ("--task", "tests.hard_tasks:Plain")
OVERFLOWING = ("--task", "tests.hard_tasks:Overflowing", "--precision", "fp16")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What the trainer changes of its process is set back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def learner_of(task: Task, model: nn.Module, **settings: object) -> Learner:
    """A learner of a model alone."""
    return Learner(TrainerSettings.model_validate({"store": "none"} | settings), task, model, Ranks())


def trained(store: Path, *flags: str) -> dict[str, Tensor]:
    """The weights that the trainer ends with."""
    assert main(["--store", str(store), *NOISY, *SHORT, *flags]) == 0
    return weights_of(store)


def gradients(model: nn.Module) -> Tensor:
    """All gradients of a model, as a vector."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


# -- accumulation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("fp16", 1e-3)])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(precision: str, tolerance: float) -> None:
    """The parts' gradients add up to the mean over all rows, and the loss is the mean of theirs."""
    task, model = Plain(), PlainNet()
    found = []
    for accumulate in (1, 2, 16):
        one = copy.deepcopy(model)
        learner = learner_of(task, one, accumulate=accumulate, precision=precision)
        loss = learner.backward(task.batch(0, 64, 0))
        found.append(torch.cat([gradients(one) / learner.scale, loss.view(1)]))
    rows, labels = task.batch(0, 64, 0)
    expected = nn.functional.cross_entropy(model(rows), labels)
    expected.backward()  # type: ignore[no-untyped-call]
    for vector in found:
        torch.testing.assert_close(vector, torch.cat([gradients(model), expected.view(1)]), rtol=0, atol=tolerance)


def test_a_run_in_parts_ends_with_the_weights_of_a_whole_one(tmp_path: Path) -> None:
    """Averages and learning rate count optimizer steps, not parts."""
    whole, parts = (trained(tmp_path / number, *PLAIN, "--accumulate", number) for number in ("1", "4"))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-4, atol=1e-5)
    assert newest(tmp_path / "4").ema == newest(tmp_path / "1").ema
    assert newest(tmp_path / "4").ema.updates == STEPS


def test_a_batch_that_has_no_such_parts_is_refused_before_the_store_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """64 rows are not to be had in 5 parts."""
    assert main(["--store", str(tmp_path / "store"), *NOISY, "--accumulate", "5"]) == 1
    assert (
        "a batch of 64 rows cannot be split evenly into 1 × 5 parts (ranks × micro-batches)" in capsys.readouterr().err
    )
    assert not (tmp_path / "store").exists()


# -- half precision ------------------------------------------------------------------------------------------------


def test_what_overflows_in_fp16_changes_nothing_but_the_scale() -> None:
    """Weights, learning rate and optimizer stay as they are; the next batch is learned from again."""
    task, model = Overflowing(), PlainNet()
    learner = learner_of(task, model, precision="fp16")
    for step in range(max(OVERFLOWS) + 2):
        weights, rate, scale = copy.deepcopy(model.state_dict()), learner.learning_rate, learner.scale
        learner.backward(task.batch(step, 64, 0))
        stepped = learner.step()
        assert stepped == (step not in OVERFLOWS)
        same = all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
        assert same == (not stepped)
        assert (learner.learning_rate == rate) == (not stepped)
        assert (learner.scale < scale) == (not stepped)


def test_a_step_left_out_is_not_averaged_and_a_killed_run_goes_on_with_its_scale(tmp_path: Path) -> None:
    """The average has as many updates as there were steps that changed the weights; resuming is bit-exact in fp16, too."""
    expected = trained(tmp_path / "uninterrupted", *OVERFLOWING)
    manifest = newest(tmp_path / "uninterrupted")
    assert manifest.training.step == STEPS
    assert manifest.ema.updates == STEPS - len(OVERFLOWS)
    resume = ("--resume", str(tmp_path / "resume"))
    with Trainer(tmp_path, tmp_path / "store", *OVERFLOWING, *resume, hold_at=[25]) as trainer:
        trainer.wait_at(25)
        trainer.process.kill()
        trainer.ended()
        trainer.let_go(25)
    found = trained(tmp_path / "store", *OVERFLOWING, *resume)
    assert newest(tmp_path / "store").weights.digest == manifest.weights.digest
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_publishes_float32(tmp_path: Path, precision: str) -> None:
    """Autocast computes in half precision; weights and average keep theirs, and end near those of fp32."""
    half, full = (trained(tmp_path / name, *PLAIN, "--precision", name) for name in (precision, "fp32"))
    assert {weight.dtype for weight in half.values()} == {torch.float32}
    assert any(not torch.equal(half[name], weight) for name, weight in full.items())
    for name, weight in full.items():
        torch.testing.assert_close(half[name], weight, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_autocast_computes_in_what_its_name_says(name: str, dtype: torch.dtype) -> None:
    """A matrix product comes out in that type, and only fp16 needs its loss scaled."""
    precision = Precision.of(name, CPU)
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert precision.scaler().is_enabled() == (name == "fp16")


def test_on_the_cpu_auto_is_float32() -> None:
    """Half precision would be slower there; and it is one run, whether the name is given or found."""
    assert Precision.of("auto", CPU) == Precision.of("fp32", CPU)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_on_cuda_auto_is_half_precision() -> None:
    """bf16, unless the device would only emulate it."""
    cuda = torch.device("cuda")
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert Precision.of("auto", cuda).name == ("bf16" if native else "fp16")


def test_another_precision_is_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of a run in fp32 is not gone on with in bf16; `auto` is what it stands for."""
    resume = ("--resume", str(tmp_path / "resume"))
    trained(tmp_path / "store", *resume)
    trained(tmp_path / "store", *resume, "--precision", "fp32", "--device", "cpu")
    assert main(["--store", str(tmp_path / "store"), *NOISY, *SHORT, *resume, "--precision", "bf16"]) == 1
    assert "its precision is fp32, this run's bf16" in capsys.readouterr().err


# -- clipping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_gradient_is_clipped_as_it_is_without_the_scale(precision: str) -> None:
    """Its norm before is what is reported, and its norm after is at most the limit, whatever the loss was scaled by."""
    task, model = Plain(), PlainNet()
    rows, labels = task.batch(0, 64, 0)
    nn.functional.cross_entropy(model(rows), labels).backward()  # type: ignore[no-untyped-call]
    norm = gradients(model).norm()
    for limit in (norm.item() / 10, norm.item() * 10):
        learner = learner_of(task, copy.deepcopy(model), precision=precision, clip_norm=limit)
        clipped = learner._wrapped
        learner.backward((rows, labels))
        assert learner.step()
        assert learner.grad_norm is not None
        torch.testing.assert_close(learner.grad_norm, norm, rtol=1e-2, atol=0)
        torch.testing.assert_close(gradients(clipped).norm(), norm.clamp(max=limit), rtol=1e-2, atol=0)


def test_without_a_limit_no_norm_is_taken() -> None:
    """What is not asked for is not computed."""
    task = Plain()
    learner = learner_of(task, PlainNet())
    learner.backward(task.batch(0, 64, 0))
    assert learner.step()
    assert learner.grad_norm is None


# -- algorithms ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_compiled_run_publishes_the_plain_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights have the plain module's names, and are those of a run that was not compiled, but for rounding."""
    plain = trained(tmp_path / "plain", *PLAIN)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    with Trainer(tmp_path, tmp_path / "compiled", *PLAIN, "--compile") as trainer:
        assert trainer.ended() == 0, trainer.log
    assert list((tmp_path / "inductor").rglob("*.cpp"))
    compiled = weights_of(tmp_path / "compiled")
    assert newest(tmp_path / "compiled").architecture == Architecture.of(PlainNet)
    assert compiled.keys() == plain.keys() == PlainNet().state_dict().keys()
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-4, atol=1e-5)


def test_deterministic_refuses_what_gives_other_bits_each_time(tmp_path: Path) -> None:
    """With the flag such an algorithm is an error that names it; without, it is used; and the rest works with it."""
    undetermined = ("--task", "tests.hard_tasks:Undetermined", "--steps", "2")
    with Trainer(tmp_path, tmp_path / "a", *undetermined, "--deterministic") as trainer:
        assert trainer.ended() == 1
        assert "put_ does not have a deterministic implementation" in trainer.log
    with Trainer(tmp_path, tmp_path / "b", "--deterministic") as trainer:
        assert trainer.ended() == 0, trainer.log
    trained(tmp_path / "c", *undetermined)
    assert newest(tmp_path / "b").training.step == STEPS


def test_cublas_is_told_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that cuBLAS reads is set, unless somebody has set it."""
    was = torch.backends.cudnn.benchmark
    try:
        for given, expected in ((None, ":4096:8"), (":16:8", ":16:8")):
            monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
            if given:
                monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
            set_deterministic()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = was


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_for_cuda(tf32: bool) -> None:
    """Torch's flags are set for a CUDA device, as those who read them find them; a CPU keeps its own."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        set_float32(CPU, tf32=tf32)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
        set_float32(torch.device("cuda"), tf32=tf32)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# -- the learning rate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "final", "expected"),
    [
        (0, 0.0, 0.1),
        (8, 0.0, 0.9),
        (10, 0.0, 1.0),
        (60, 0.0, 0.5),
        (110, 0.0, 0.0),
        (200, 0.0, 0.0),
        (4, 0.2, 0.5),
        (60, 0.2, 0.6),
        (110, 0.2, 0.2),
        (200, 0.2, 0.2),
    ],
)
def test_the_cosine_goes_from_the_peak_to_its_end(step: int, final: float, expected: float) -> None:
    """A linear rise over the warm-up, then half a cosine down to the final share, where it stays."""
    assert warmup_and_cosine(step, warmup=10, steps=110, final=final) == pytest.approx(expected)


def test_without_an_end_or_with_a_constant_schedule_the_peak_stays() -> None:
    """After the warm-up nothing changes any more; without a warm-up nothing changes at all."""
    for step in (10, 11, 10**6):
        assert warmup_and_constant(step, warmup=10) == warmup_and_cosine(step, warmup=10, steps=0, final=0.1) == 1
    assert warmup_and_constant(0, warmup=0) == warmup_and_cosine(0, warmup=0, steps=10) == 1
    assert warmup_and_constant(4, warmup=10) == 0.5


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 2e-4), ("constant", 2e-3)])
def test_the_settings_choose_the_schedule(schedule: str, last: float) -> None:
    """The learning rate after the last step is the schedule's end."""
    task = Plain()
    settings = {"lr_schedule": schedule, "steps": 20, "warmup_steps": 5, "final_learning_rate": 0.1}
    learner = learner_of(task, PlainNet(), **settings)
    rates = []
    for step in range(20):
        rates.append(learner.learning_rate)
        learner.backward(task.batch(step, 8, 0))
        learner.step()
    assert rates[:5] == pytest.approx([4e-4, 8e-4, 12e-4, 16e-4, 20e-4])
    assert learner.learning_rate == pytest.approx(last)
