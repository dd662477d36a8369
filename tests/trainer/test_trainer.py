"""The trainer as people run it: killed, stopped, misled and short of space, and the versions that come of it."""

import json
import logging
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from emaswap import DirectoryStore, ModelEMA, PowerFunction, Publisher
from tests.disk import fill, small_disk
from tests.models import Linear
from tests.serving import wait_for
from tests.tasks import Noisy, NoisyNet
from tests.training import NOISY, SHORT, STEPS, Trainer, assert_same_end, assert_whole, newest, weights_of
from trainer.__main__ import main


def is_newest(store: Path, version: int) -> bool:
    """Whether this is the newest version of a store."""
    return DirectoryStore(store).newest() == version


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run that nothing happened to, and that was not faster than the disk."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with Trainer(folder, folder / "store", "--resume", str(folder / "resume"), hold_at=[21, 41]) as trainer:
        for version, step in ((1, 21), (2, 41)):
            trainer.wait_at(step)
            wait_for(partial(is_newest, folder / "store", version), what=f"version {version}")
            trainer.let_go(step)
        assert trainer.ended() == 0, trainer.log
    return folder / "store"


@pytest.fixture
def in_process() -> Iterator[None]:
    """The trainer may run in this process: what it changes of it is set back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train_here(store: Path, *flags: str) -> int:
    """Run the trainer in this process; the exit status."""
    return main(["--store", str(store), *NOISY, *SHORT, *flags])


# -- runs that are interrupted -------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_weights_of_one_that_was_not(tmp_path: Path, uninterrupted: Path) -> None:
    """Killed before any checkpoint, and again later, a run ends with weights that are the same to the last bit."""
    store, resume = tmp_path / "store", ("--resume", str(tmp_path / "resume"))
    for step in (7, 47):
        with Trainer(tmp_path, store, *resume, hold_at=[step]) as trainer:
            trainer.wait_at(step)
            trainer.process.kill()
            assert trainer.ended() == -signal.SIGKILL
            trainer.let_go(step)
    with Trainer(tmp_path, store, *resume) as trainer:
        assert trainer.ended() == 0, trainer.log
        assert "resuming at step 40" in trainer.log
    assert_same_end(store, uninterrupted)


def test_a_stopped_run_publishes_and_saves_the_step_it_was_at(tmp_path: Path, uninterrupted: Path) -> None:
    """SIGTERM and SIGINT end a run with status 0 after its step, and it goes on from just there to the same weights."""
    store, resume = tmp_path / "store", ("--resume", str(tmp_path / "resume"))
    for step, number in ((13, signal.SIGTERM), (33, signal.SIGINT)):
        with Trainer(tmp_path, store, *resume, hold_at=[step]) as trainer:
            trainer.wait_at(step)
            trainer.process.send_signal(number)
            trainer.let_go(step)
            assert trainer.ended() == 0, trainer.log
            assert f"stopped at step {step + 1}" in trainer.log
        assert newest(store).training.step == step + 1
    with Trainer(tmp_path, store, *resume) as trainer:
        assert trainer.ended() == 0, trainer.log
        assert "resuming at step 34" in trainer.log
    assert_same_end(store, uninterrupted)


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    """Who does not want to wait for the step to end asks twice."""
    with Trainer(tmp_path, tmp_path / "store", hold_at=[5]) as trainer:
        trainer.wait_at(5)

        def asked_again() -> bool:
            trainer.process.send_signal(signal.SIGTERM)
            return trainer.process.poll() is not None

        wait_for(asked_again, what="the end")
        assert trainer.ended() == -signal.SIGTERM


def test_a_finished_run_that_is_run_again_changes_nothing(tmp_path: Path, in_process: None) -> None:
    """A run that has done all its steps is done, and does not publish the same weights once more."""
    flags = ("--resume", str(tmp_path / "resume"))
    assert train_here(tmp_path / "store", *flags) == 0
    before = newest(tmp_path / "store")
    assert train_here(tmp_path / "store", *flags) == 0
    assert newest(tmp_path / "store") == before


def test_without_resume_nothing_is_saved(tmp_path: Path, in_process: None) -> None:
    """A run that was given no folder for checkpoints writes to its store and nowhere else."""
    assert train_here(tmp_path / "store") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(tmp_path: Path, in_process: None) -> None:
    """A run depends on its seed and on nothing else."""
    digests = []
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert train_here(tmp_path / name, "--seed", seed) == 0
        digests.append(newest(tmp_path / name).weights.digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    "flags",
    [
        ("--seed", "4"),
        ("--batch-size", "32"),
        ("--steps", "70"),
        ("--task", "digits"),
        ("--lr-schedule", "constant"),
        ("--clip-norm", "1"),
        ("--ema-schedule", "constant"),
        ("--ema-variant", "short=0.05"),
        ("--ema-update-every", "2"),
    ],
    ids=" ".join,
)
def test_another_runs_checkpoint_is_refused(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    """Going on with other settings than a run began with is an error that shows both, and publishes nothing."""
    resume = ("--resume", str(tmp_path / "resume"))
    assert train_here(tmp_path / "store", "--steps", "5", *resume) == 0
    capsys.readouterr()
    assert train_here(tmp_path / "other", "--steps", "5", *resume, *flags) == 1
    error = capsys.readouterr().err
    assert "belongs to another run" in error
    assert "another --resume directory" in error
    assert not (tmp_path / "other" / "versions").exists()


# -- the store -----------------------------------------------------------------------------------------------------


def test_versions_carry_metrics_of_raw_and_averaged_weights(uninterrupted: Path) -> None:
    """Every version says how good the raw and the averaged weights were, at which step, and how they were averaged."""
    store = DirectoryStore(uninterrupted)
    manifests = [store.manifest(version) for version in store.versions()]
    assert [manifest.training.step for manifest in manifests] == [20, 40, 60]
    assert [manifest.ema.updates for manifest in manifests] == [20, 40, 60]
    for manifest in manifests:
        metrics = manifest.training.metrics
        assert metrics.keys() == {"raw_accuracy", "ema_accuracy", "train_loss"}
        for name in ("raw_accuracy", "ema_accuracy"):
            assert 0.2 < (metrics[name] or 0.0) <= 1
    assert (manifests[-1].training.metrics["ema_accuracy"] or 0.0) > 0.8


def test_a_task_of_ones_own_is_published_with_its_own_names(uninterrupted: Path) -> None:
    """Model, factory and signature are the task's."""
    manifest = newest(uninterrupted)
    assert manifest.model == "noisy"
    assert manifest.architecture.factory == "tests.tasks:NoisyNet"
    assert manifest.signature == Noisy().signature()


def test_digits_are_what_is_trained_without_a_task(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The built-in task needs a store and nothing else; each version is a line of the output."""
    flags = ["--steps", "10", "--publish-every", "5", "--threads", "1", "--device", "cpu"]
    assert main(["--store", str(tmp_path / "store"), *flags]) == 0
    manifest = newest(tmp_path / "store")
    assert manifest.model == "digits"
    assert manifest.signature.labels == tuple("0123456789")
    assert {"raw_accuracy", "ema_accuracy", "raw_loss", "ema_loss"} <= manifest.training.metrics.keys()
    output = capsys.readouterr().out
    assert f"published version {manifest.version}  step 10" in output
    assert "done: 10 steps" in output


def test_another_models_store_is_refused(tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A trainer does not mix its versions with those of another model."""
    with Publisher(
        tmp_path / "store", name="other", architecture="tests.models:Linear", probe=torch.ones(1, 3)
    ) as publisher:
        publisher.publish(Linear())
    assert train_here(tmp_path / "store") == 1
    assert "holds versions of 'other', not of 'noisy'" in capsys.readouterr().err
    assert DirectoryStore(tmp_path / "store").versions() == [1]


@pytest.mark.parametrize("location", ["gs://bucket/models", "/dev/null/store"], ids=["unknown scheme", "no directory"])
def test_a_store_that_cannot_be_opened_is_an_error(
    in_process: None, capsys: pytest.CaptureFixture[str], location: str
) -> None:
    """The trainer says which store it cannot use and ends with status 1, before it trains."""
    assert main(["--store", location, *NOISY, *SHORT]) == 1
    error = capsys.readouterr().err
    assert error.startswith("trainer: cannot ")
    assert location in error


def test_a_trainer_that_is_taken_over_ends_and_says_why(tmp_path: Path) -> None:
    """When another publisher takes the store, the trainer stops with status 1, and the other's version stays."""
    with Trainer(tmp_path, tmp_path / "store", hold_at=[25]) as trainer:
        trainer.wait_at(25)
        store = DirectoryStore(tmp_path / "store")
        wait_for(store.newest, what="the first version")
        with Publisher(store, name="noisy", architecture="tests.tasks:NoisyNet", probe=Noisy().probe()) as other:
            other.publish(ModelEMA(NoisyNet()), step=12345)
        trainer.let_go(25)
        assert trainer.ended() == 1, trainer.log
        assert "another publisher has taken over" in trainer.log
        assert "Traceback" not in trainer.log
    assert store.versions() == [1, 2]
    assert newest(tmp_path / "store").training.step == 12345


def test_training_goes_on_while_the_disk_is_full(tmp_path: Path) -> None:
    """A version that finds no space is a warning; once there is space, later ones are published again."""
    with small_disk(tmp_path / "disk", "256k") as disk:
        store = DirectoryStore(disk / "store")
        with Trainer(tmp_path, store.root, "--resume", str(tmp_path / "resume"), hold_at=[25, 45]) as trainer:
            trainer.wait_at(25)
            wait_for(lambda: store.hint() == 1, what="the first version")
            filler = fill(disk)
            trainer.let_go(25)
            trainer.wait_at(45)
            wait_for(lambda: "step 40 was not published" in trainer.log, what="the failure")
            assert store.versions() == [1]
            assert store.files.entries("tmp") == {}
            filler.unlink()
            trainer.let_go(45)
            assert trainer.ended() == 0, trainer.log
            assert "No space left on device" in trainer.log
        assert [store.manifest(version).training.step for version in store.versions()] == [20, 60]
        assert_whole(store.root)


def test_a_last_version_that_could_not_be_published_is_published_when_run_again(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose end did not reach the store fails, and the same command publishes the end once it can."""
    flags = ("--resume", str(tmp_path / "resume"), "--publish-every", str(STEPS))
    with small_disk(tmp_path / "disk", "256k") as disk:
        store = DirectoryStore(disk)
        store.prepare()
        filler = fill(disk)
        assert train_here(disk, *flags) == 1
        assert f"step {STEPS} was not published" in capsys.readouterr().err
        assert store.versions() == []
        filler.unlink()
        assert train_here(disk, *flags) == 0
        assert store.versions() == [1]
        assert store.manifest(1).training.step == STEPS


def test_a_checkpoint_that_finds_no_space_is_no_reason_to_lose_a_run(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """While checkpoints cannot be saved, training continues with a warning, and its versions are published."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        fill(disk)
        status = train_here(tmp_path / "store", "--resume", str(disk))
    printed = "".join(capsys.readouterr())
    assert status == 0
    assert "No space left on device" in printed
    assert newest(tmp_path / "store").training.step == STEPS


# -- the average, and what else comes of a run ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), {"name": "exponential_ramp", "decay": 0.995, "tau": 100}),
        (("--ema-decay", "0.9", "--ema-tau", "7"), {"name": "exponential_ramp", "decay": 0.9, "tau": 7}),
        (("--ema-schedule", "constant", "--ema-decay", "0.9"), {"name": "constant", "decay": 0.9}),
        (("--ema-schedule", "count_ramp"), {"name": "count_ramp", "decay": 0.995}),
        (("--ema-schedule", "inverse_gamma"), {"name": "inverse_gamma", "decay": 0.995}),
        (("--ema-schedule", "power_function"), PowerFunction.from_sigma_rel(0.1).describe()),
        (
            ("--ema-schedule", "power_function", "--ema-sigma-rel", "0.05"),
            PowerFunction.from_sigma_rel(0.05).describe(),
        ),
        (("--ema-schedule", "constant", "--ema-scale", "2"), {"name": "constant", "decay": 0.995, "kappa": 2}),
    ],
    ids=["default", "decay and tau", "constant", "count ramp", "inverse gamma", "power function", "narrow", "scaled"],
)
def test_versions_are_averaged_as_the_settings_say(
    tmp_path: Path, in_process: None, flags: tuple[str, ...], expected: dict[str, object]
) -> None:
    """The manifest has the schedule that the flags name, with their parameters."""
    assert train_here(tmp_path / "store", "--steps", "5", *flags) == 0
    found = newest(tmp_path / "store").ema
    assert found.schedule is not None
    assert expected.items() <= found.schedule.model_dump().items()
    assert found.updates == 5


def test_an_average_that_is_updated_more_rarely_has_the_same_window(tmp_path: Path, in_process: None) -> None:
    """With an interval the average is another one, near the one of every step, and its count is still of steps."""
    flags = ("--task", "tests.hard_tasks:Plain", "--ema-schedule", "constant", "--ema-decay", "0.9")
    for every in ("1", "5"):
        assert train_here(tmp_path / every, *flags, "--ema-update-every", every) == 0
    often, rarely = weights_of(tmp_path / "1"), weights_of(tmp_path / "5")
    assert any(not torch.equal(rarely[name], weight) for name, weight in often.items())
    for name, weight in often.items():
        torch.testing.assert_close(rarely[name], weight, rtol=0.05, atol=0.02)
    assert newest(tmp_path / "5").ema.updates == STEPS


def test_buffers_may_be_copied_instead_of_averaged(tmp_path: Path, in_process: None) -> None:
    """Batch norm's statistics are then the model's own, and the weights are averaged all the same."""
    for kind in ("average", "copy"):
        assert train_here(tmp_path / kind, "--ema-buffers", kind) == 0
    averaged, copied = weights_of(tmp_path / "average"), weights_of(tmp_path / "copy")
    different = {name for name, weight in averaged.items() if not torch.equal(copied[name], weight)}
    assert different == {"layers.1.running_mean", "layers.1.running_var"}


def test_further_averages_are_evaluated_and_published(tmp_path: Path, in_process: None) -> None:
    """Each variant has metrics of its own, and is published with the version; the main average is what it was."""
    assert train_here(tmp_path / "plain") == 0
    assert train_here(tmp_path / "store", "--ema-variant", "narrow=0.05", "--ema-variant", "wide=0.2, x=0.1") == 0
    manifest = newest(tmp_path / "store")
    assert set(manifest.variants) == {"narrow", "wide", "x"}
    assert {"ema_narrow_accuracy", "ema_wide_accuracy", "ema_x_accuracy"} <= manifest.training.metrics.keys()
    assert manifest.weights.digest == newest(tmp_path / "plain").weights.digest
    assert len({variant.weights.digest for variant in manifest.variants.values()}) == 3


def test_versions_may_be_published_in_half_precision(tmp_path: Path, in_process: None) -> None:
    """The parameters in the store are bfloat16; the run itself is not rounded."""
    assert train_here(tmp_path / "store", "--publish-dtype", "bfloat16") == 0
    weights = weights_of(tmp_path / "store")
    assert weights["layers.0.weight"].dtype == torch.bfloat16
    assert newest(tmp_path / "store").ema.dtype == "float32"


def test_a_run_is_recorded_step_by_step(tmp_path: Path, in_process: None) -> None:
    """Every so many steps the record has the loss and what belongs to it, and at each version the metrics, too."""
    log = tmp_path / "log"
    flags = ("--log-dir", str(log), "--log-every", "8", "--clip-norm", "1", "--publish-every", "30")
    assert train_here(tmp_path / "store", *flags, "--resume", str(tmp_path / "resume")) == 0
    lines = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [8, 16, 24, 30, 32, 40, 48, 56, 60]
    figures = {"train_loss", "learning_rate", "steps_per_second", "ema_skipped", "grad_norm"}
    for line in lines:
        assert figures <= line.keys()
        assert ("ema_accuracy" in line) == ("raw_accuracy" in line) == (line["step"] % 30 == 0)
        assert line["steps_per_second"] > 0
        assert line["grad_norm"] > 0
    assert lines[-1]["learning_rate"] == 0
    assert lines[-1]["train_loss"] == newest(tmp_path / "store").training.metrics["train_loss"]
    assert list(log.glob("events.out.tfevents.*"))
    assert (log / "accuracy.png").exists()


def test_what_is_not_the_training_itself_may_fail(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a place for its heartbeat and its record a run goes on to its end, and says so once for each."""
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "beneath")
    assert train_here(tmp_path / "store", "--heartbeat", nowhere, "--log-dir", nowhere, "--log-every", "1") == 0
    printed = capsys.readouterr().out
    assert printed.count("Not a directory") == 2
    assert printed.count("training continues") == 2
    assert newest(tmp_path / "store").training.step == STEPS


def test_a_heartbeat_that_fails_again_is_said_again(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning is not repeated at each step, but a failure after it has worked is a new one."""
    folder = tmp_path / "beats"
    flags = ("--heartbeat", str(folder / "beat"))
    with Trainer(tmp_path, tmp_path / "store", *flags, hold_at=[20, 40]) as trainer:
        trainer.wait_at(20)
        assert trainer.log.count("training continues") == 1
        folder.mkdir()
        trainer.let_go(20)
        trainer.wait_at(40)
        (folder / "beat").unlink()
        folder.rmdir()
        trainer.let_go(40)
        assert trainer.ended() == 0, trainer.log
        assert trainer.log.count("training continues") == 2


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("cats", "unknown task 'cats': expected digits, mnist5k, or package.module:Class"),
        ("no.such.package:Task", "cannot load task 'no.such.package:Task'"),
        ("tests.tasks:Nowhere", "cannot load task 'tests.tasks:Nowhere'"),
        (":Task", "unknown task ':Task'"),
        ("tests.tasks:Nameless", "tests.tasks:Nameless is not a task: it lacks architecture, signature, batch"),
        ("tests.tasks:Demanding", "cannot load task 'tests.tasks:Demanding'"),
        ("tests.tasks:Failing", "cannot load task 'tests.tasks:Failing'"),
    ],
    ids=["unknown name", "no such package", "no such class", "no package", "incomplete", "takes arguments", "fails"],
)
def test_a_task_that_is_not_there_is_an_error(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str], task: str, message: str
) -> None:
    """The message names the task and what is wrong with it; the status is 1, and there is no store."""
    assert main(["--store", str(tmp_path / "store"), "--task", task]) == 1
    assert f"trainer: {message}" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--steps", "-1"),
        ("--steps", "many"),
        ("--publish-every", "0"),
        ("--device", "gpu"),
        ("--seed", "-1"),
        ("--batch-size", "0"),
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--ema-decay", "1"),
        ("--ema-tau", "0"),
        ("--ema-sigma-rel", "0.3"),
        ("--ema-scale", "0"),
        ("--ema-update-every", "0"),
        ("--ema-buffers", "drop"),
        ("--ema-schedule", "cosine"),
        ("--ema-variant", "short"),
        ("--ema-variant", "=0.1"),
        ("--ema-variant", "a=b"),
        ("--publish-dtype", "float64"),
        ("--precision", "fp8"),
        ("--accumulate", "0"),
        ("--lr-schedule", "linear"),
        ("--final-learning-rate", "1.5"),
        ("--clip-norm", "0"),
        ("--log-every", "0"),
        ("--ranks-timeout-s", "0"),
        ("--keep", "0"),
        ("--threads", "-1"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    """The status is 2, and the message starts with the flag as people write it."""
    with pytest.raises(SystemExit, match="2"):
        main(["--store", str(tmp_path / "store"), f"{flag}={value}"])
    error = capsys.readouterr().err
    assert error.startswith(f"{flag}: ")
    assert "see python -m trainer --help" in error
    assert not (tmp_path / "store").exists()


def test_a_store_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a store there is nowhere to publish to: status 2, naming the flag."""
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert capsys.readouterr().err.startswith("--store: ")


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt flag is not passed over in silence."""
    with pytest.raises(SystemExit) as caught:
        main(["--store", "x", "--step", "3", "--publish-evry", "5"])
    assert caught.value.code == 2
    assert "--publish-evry" in capsys.readouterr().err


def test_settings_are_variables_too(tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flag may be given as EMASWAP_..., and a flag goes before its variable."""
    variables = {
        "STORE": str(tmp_path / "store"),
        "TASK": "tests.tasks:Noisy",
        "STEPS": "30",
        "PUBLISH_EVERY": "10",
        "EMA_DECAY": "0.5",
        "KEEP": "100",
        "RESUME": str(tmp_path / "resume"),
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"EMASWAP_{name}", value)
    assert main(["--steps", "20"]) == 0
    manifest = newest(tmp_path / "store")
    assert manifest.training.step == 20
    assert manifest.ema.schedule is not None
    assert manifest.ema.schedule.model_dump()["decay"] == 0.5
    assert len(list((tmp_path / "resume").iterdir())) == 2


def test_a_wrong_variable_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong value in a variable is reported like one on the command line."""
    monkeypatch.setenv("EMASWAP_PUBLISH_EVERY", "often")
    with pytest.raises(SystemExit, match="2"):
        main(["--store", str(tmp_path / "store")])
    assert capsys.readouterr().err.startswith("--publish-every: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_an_error(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asking for CUDA where there is none says so instead of training for days on the CPU."""
    assert train_here(tmp_path / "store", "--device", "cuda") == 1
    assert "torch sees no CUDA device here; use --device auto or cpu" in capsys.readouterr().err


def test_the_newest_versions_are_kept(tmp_path: Path, in_process: None, caplog: pytest.LogCaptureFixture) -> None:
    """--keep is taken without complaint, and young versions stay beside those that it keeps."""
    with caplog.at_level(logging.WARNING):
        assert train_here(tmp_path / "store", "--keep", "1", "--publish-every", "10") == 0
    assert newest(tmp_path / "store").training.step == STEPS
    assert caplog.text == ""
    assert_whole(tmp_path / "store")
