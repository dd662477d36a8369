"""A trainer that tests start, stop and kill, and what came of it."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from torch import Tensor

from emaswap import DirectoryStore, Manifest
from tests.programs import Program, interpreter
from tests.serving import wait_for
from tests.tasks import GATES

STEPS = 60
NOISY = ("--task", "tests.tasks:Noisy")
SHORT = ("--steps", str(STEPS), "--publish-every", "20", "--threads", "1", "--seed", "3")


class Trainer:
    """`python -m trainer` as a process of its own, or as many ranks, that a test can hold at the beginning of some steps.

    It trains `Noisy`, unless the flags say otherwise. Ranks are torchrun's, which forks them unless they are to be
    `fresh`: started as people start them.
    """

    def __init__(
        self,
        folder: Path,
        store: Path,
        *flags: str,
        hold_at: Sequence[int] = (),
        ranks: int = 0,
        fresh: bool = False,
    ) -> None:
        self.gates = folder / "gates"
        self.gates.mkdir(exist_ok=True)
        for path in self.gates.glob("pid-of-rank.*"):
            path.unlink()
        for step in hold_at:
            (self.gates / str(step)).touch()
        self._log = folder / "trainer.log"
        torchrun = "torch.distributed.run" if fresh else "tests.torchrun"
        run = ("-m", torchrun, "--standalone", f"--nproc-per-node={ranks}") if ranks else ()
        where = ("--device", "cpu") if ranks else ()  # there may be fewer devices than ranks
        command = [*run, "-m", "trainer", "--store", str(store), *NOISY, *SHORT, *where, *flags]
        environment = os.environ | {GATES: str(self.gates), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        start = interpreter if fresh else Program
        with self._log.open("w") as log:
            self.process = start(*command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    @property
    def log(self) -> str:
        """All that the trainer has printed."""
        return self._log.read_text()

    def wait_at(self, step: int) -> None:
        """Return once the trainer is held at the beginning of a step."""
        reached = self.gates / f"{step}.reached"
        wait_for(lambda: reached.exists() or self.process.poll() is not None, what=f"step {step}")
        assert reached.exists(), self.log
        reached.unlink()

    def let_go(self, step: int) -> None:
        """Let the trainer go on from a step it is held at."""
        (self.gates / str(step)).unlink()

    def ranks(self) -> dict[int, int]:
        """The process of each rank that has been forked."""
        return {int(path.suffix[1:]): int(path.read_text()) for path in self.gates.glob("pid-of-rank.*")}

    def ended(self) -> int:
        """The exit status. Where it does not end, it is asked where it is, for the log."""
        try:
            return self.process.wait(120)
        except subprocess.TimeoutExpired:
            for pid in (*self.ranks().values(), self.process.pid):
                os.kill(pid, signal.SIGABRT)  # PYTHONFAULTHANDLER has each write its stack
            self.process.wait(60)
            raise AssertionError(f"the trainer does not end:\n{self.log}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for pid in (*self.ranks().values(), self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(60)


def newest(store: Path) -> Manifest:
    """The newest version's manifest."""
    opened = DirectoryStore(store)
    return opened.manifest(opened.newest())


def assert_whole(store: Path) -> None:
    """Every version of a store is there, readable, and numbered without gaps."""
    opened = DirectoryStore(store)
    versions = opened.versions()
    assert versions == list(range(1, len(versions) + 1))
    for version in versions:
        manifest = opened.manifest(version)
        opened.tensors("weights", manifest.weights)
        opened.tensors("probes", manifest.probe)


def assert_same_end(store: Path, other: Path) -> None:
    """Two runs have ended with the same weights and metrics, and one of them, at least, with a store in good order."""
    assert_whole(store)
    ours, theirs = newest(store), newest(other)
    assert ours.training == theirs.training
    assert ours.training.step == STEPS
    assert ours.ema == theirs.ema
    assert ours.weights.digest == theirs.weights.digest


def weights_of(store: Path) -> dict[str, Tensor]:
    """The newest version's weights."""
    opened, manifest = DirectoryStore(store), newest(store)
    return dict(opened.tensors("weights", manifest.weights).tensors)
