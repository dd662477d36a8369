"""Ranks that train one model: they publish what one process would, stop together, and none waits for ever."""

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from emaswap import DirectoryStore, EmaswapError, ModelEMA, Publisher
from emaswap.models.digits import DigitsNet
from tests.programs import ROOT, run
from tests.serving import wait_for
from tests.tasks import Noisy, NoisyNet
from tests.training import SHORT, STEPS, Trainer, assert_same_end, assert_whole, newest, weights_of
from trainer.__main__ import main
from trainer.distributed import Ranks, joined
from trainer.randomness import seed_run, seed_step

DIGITS = ("--device", "cpu", "--steps", "20", "--publish-every", "20")


@pytest.fixture
def in_process() -> Iterator[None]:
    """The trainer may run in this process: its handlers of signals are set back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# -- the same weights as one process -------------------------------------------------------------------------------


def assert_close(found: Path, expected: Path, tolerance: float) -> None:
    """Two stores' newest weights are the same, but for rounding."""
    ours, theirs = weights_of(found), weights_of(expected)
    assert ours.keys() == theirs.keys() == DigitsNet().state_dict().keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=tolerance, atol=tolerance)
    assert newest(found).training.metrics == pytest.approx(newest(expected).training.metrics, rel=1e-4)
    assert newest(found).ema == newest(expected).ema


@pytest.mark.parametrize(
    ("flags", "tolerance", "fresh"),
    [
        (("--task", "digits", "--steps", "5"), 1e-3, True),
        (("--task", "tests.hard_tasks:ExactDigits", "--accumulate", "2", "--clip-norm", "0.5"), 1e-9, False),
    ],
    ids=["float32, by torchrun itself", "double, in parts"],
)
def test_two_ranks_publish_what_one_process_does(
    tmp_path: Path, in_process: None, flags: tuple[str, ...], tolerance: float, fresh: bool
) -> None:
    """Batch norm and all, the same global batches give the same weights, but for the rounding of sums.

    In float32 rounding grows where it decides which way a ReLU or a maximum goes; in double precision it does not get
    that far in 20 steps.
    """
    with Trainer(tmp_path, tmp_path / "two", *DIGITS, *flags, ranks=2, fresh=fresh) as trainer:
        assert main(["--store", str(tmp_path / "one"), *SHORT, *DIGITS, *flags]) == 0
        assert trainer.ended() == 0, trainer.log
        assert trainer.log.count("published version") == 1
    assert_close(tmp_path / "two", tmp_path / "one", tolerance)


@pytest.mark.long
def test_compiled_ranks_publish_what_one_process_does(tmp_path: Path, in_process: None) -> None:
    """Graphs that are cut where ranks wait for one another compute the same, in parts, too."""
    flags = (*DIGITS, "--task", "tests.hard_tasks:ExactDigits", "--accumulate", "2")
    assert main(["--store", str(tmp_path / "one"), *SHORT, *flags]) == 0
    with Trainer(tmp_path, tmp_path / "two", *flags, "--compile", ranks=2) as trainer:
        assert trainer.ended() == 0, trainer.log
    assert_close(tmp_path / "two", tmp_path / "one", 1e-9)


def test_ranks_understand_one_another(tmp_path: Path) -> None:
    """Batch norm over ranks is batch norm over all rows, gradients included; flags, means and buffers are shared.

    What overflows on one is left out by all, and each has random numbers of its own.
    """
    torchrun = ("-m", "tests.torchrun", "--standalone", "--nproc-per-node=2")
    done = run(*torchrun, "-m", "tests.ranks", str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all is well") == 2
    assert "0 (Own) has its own forward: it normalises each rank's rows separately" in done.stderr


def test_one_process_has_its_batch_whole() -> None:
    """Without a group nothing is split, copied or waited for, and a task's batch may be of any form."""
    ranks = Ranks()
    batch = torch.ones(3), torch.ones(5)
    assert ranks.share(batch) == [batch]
    assert ranks.any(flag=True)
    assert not ranks.any(flag=False)
    value = torch.ones(2)
    assert ranks.mean(value) is value
    assert ranks.leads
    with joined("cpu", 1.0) as alone:
        assert alone == ranks


@pytest.mark.parametrize(
    ("ranks", "rows", "message"),
    [
        (Ranks(size=3), (64,), "a batch of 64 rows cannot be split evenly into 3 × 4 parts"),
        (Ranks(), (6,), "a batch of 6 rows cannot be split evenly into 1 × 4 parts"),
        (Ranks(size=2), (8, 16), "a batch of 8 and 16 rows cannot be split evenly"),
    ],
    ids=["ranks", "parts", "tensors"],
)
def test_a_batch_that_cannot_be_shared_out_is_an_error(ranks: Ranks, rows: tuple[int, ...], message: str) -> None:
    """No row is left out in silence: the error has the numbers, and names the settings to change."""
    with pytest.raises(EmaswapError, match=message):
        ranks.share(tuple(torch.empty(number) for number in rows), 4)


def test_a_step_has_random_numbers_of_its_own() -> None:
    """They depend on the seed, the step and the rank, on nothing drawn before, and on each of the three."""

    def drawn(seed: int, step: int, rank: int) -> tuple[float, ...]:
        seed_step(seed, step, rank, torch.device("cpu"))
        return random.random(), np.random.standard_normal(), torch.rand(()).item()

    places = list(itertools.product((0, 1), (0, 1), (0, 1)))
    first = [drawn(*place) for place in places]
    assert [drawn(*place) for place in reversed(places)] == first[::-1]
    for numbers in zip(*first, strict=True):
        assert len(set(numbers)) == len(places)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    """Each rank begins with the same."""

    def built(seed: int) -> torch.Tensor:
        seed_run(seed)
        return NoisyNet().layers[0].weight  # type: ignore[return-value]

    assert torch.equal(built(2**40), built(2**40))
    assert not torch.equal(built(1), built(2))


# -- ending --------------------------------------------------------------------------------------------------------


def test_stopping_one_rank_stops_all_and_they_go_on_from_there(tmp_path: Path) -> None:
    """A signal to any one ends all with 0 after the same step; resumed, the weights are those of ranks left alone."""
    with Trainer(tmp_path, tmp_path / "uninterrupted", ranks=2) as trainer:
        assert trainer.ended() == 0, trainer.log
    store, resume = tmp_path / "store", ("--resume", str(tmp_path / "resume"))
    with Trainer(tmp_path, store, *resume, hold_at=[33], ranks=2) as trainer:
        trainer.wait_at(33)
        os.kill(trainer.ranks()[1], signal.SIGTERM)
        trainer.let_go(33)
        assert trainer.ended() == 0, trainer.log
        assert trainer.log.count("stopped at step 34") == 1
    assert newest(store).training.step == 34
    with Trainer(tmp_path, store, *resume, ranks=2) as trainer:
        assert trainer.ended() == 0, trainer.log
        assert trainer.log.count(f"resuming at step 34 from {tmp_path / 'resume'}\n") == 1
    assert_same_end(store, tmp_path / "uninterrupted")


def test_another_number_of_ranks_may_go_on_and_it_is_said(tmp_path: Path) -> None:
    """A run may move to fewer devices; what is not bit-exact about it stands in the output."""
    resume = ("--resume", str(tmp_path / "resume"))
    with Trainer(tmp_path, tmp_path / "store", *resume, hold_at=[5], ranks=2) as trainer:
        trainer.wait_at(5)
        trainer.process.terminate()  # torchrun hands it on
        wait_for(lambda: "received" in trainer.log or "Received" in trainer.log, what="torchrun to notice")
        trainer.let_go(5)
        trainer.ended()
    assert newest(tmp_path / "store").training.step == 6
    with Trainer(tmp_path, tmp_path / "store", *resume) as trainer:
        assert trainer.ended() == 0, trainer.log
        assert "resuming at step 6" in trainer.log
        assert "results will not be bit-identical: the checkpoint used 2 ranks, this run 1" in trainer.log
    assert newest(tmp_path / "store").training.step == STEPS
    assert_whole(tmp_path / "store")


def is_free(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.long
def test_ranks_that_end_never_hang() -> None:
    """Gloo's threads may still want the interpreter's lock when the group is taken down; it showed in one end of 40."""
    # Below those that the system gives to clients: such a one could be taken before its turn comes.
    ports = [str(port) for port in itertools.islice(filter(is_free, range(21000, 32000)), 100)]
    variables = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "tests.ends", *ports]
    ranks = [subprocess.Popen(command, cwd=ROOT, env=variables | {"RANK": str(rank)}) for rank in (0, 1)]
    assert [rank.wait(250) for rank in ranks] == [0, 0]


def kill_the_other(trainer: Trainer, store: DirectoryStore) -> None:
    os.kill(trainer.ranks()[1], signal.SIGKILL)


def take_the_store(trainer: Trainer, store: DirectoryStore) -> None:
    with Publisher(store, name="noisy", architecture="tests.tasks:NoisyNet", probe=Noisy().probe()) as other:
        other.publish(ModelEMA(NoisyNet()), step=12345)


@pytest.mark.parametrize("happen", [kill_the_other, take_the_store], ids=["killed", "taken over"])
def test_when_one_rank_fails_all_end(tmp_path: Path, happen: Callable[[Trainer, DirectoryStore], None]) -> None:
    """The others do not wait for a rank that has gone: an error, soon, and a store in good order."""
    store = DirectoryStore(tmp_path / "store")
    with Trainer(tmp_path, store.root, hold_at=[25], ranks=2) as trainer:
        trainer.wait_at(25)
        wait_for(store.newest, what="the first version")
        pids = trainer.ranks().values()
        happen(trainer, store)
        trainer.let_go(25)
        begun = time.monotonic()
        assert trainer.ended() != 0
        assert time.monotonic() - begun < 25
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), timeout_s=5, what="all to be gone")
    assert_whole(store.root)
    assert newest(store.root).training.step in (20, 12345)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_ranks_that_are_not_there_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that finds no one to join says so within the time it was given."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EmaswapError, match="cannot join the other ranks: "), joined("cpu", 2.0):
        pass
