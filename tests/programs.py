"""Python programs that tests run: forked from the nursery in milliseconds, or in an interpreter of their own in seconds.

A forked program has been imported before it begins. What depends on how an interpreter starts or ends wants a real one.
"""

import atexit
import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO

from tests.nursery import ADDRESS

ROOT = Path(__file__).parent.parent


@cache
def nursery_address() -> str:
    """Return the address of the nursery: the one that the environment names, or a new one that ends with this process."""
    if inherited := os.environ.get(ADDRESS):
        return inherited
    address = f"emaswap-tests-{secrets.token_hex(8)}"
    nursery = subprocess.Popen(
        [sys.executable, "-u", "-m", "tests.nursery", address],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(nursery.communicate)
    assert nursery.stdout is not None
    assert nursery.stdout.readline() == b"listening\n"
    return address


def interpreter(
    *arguments: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    stdout: IO[str] | int,
    stderr: IO[str] | int,
) -> "subprocess.Popen[str]":
    """Start `python ARGUMENTS...` in an interpreter of its own, for what depends on how one starts and ends."""
    environment = {**(os.environ if env is None else env), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=stdout, stderr=stderr, text=True)


class Program:
    """`python ARGUMENTS...` in a forked process, which is handled as a `subprocess.Popen` is. It reads no input."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        stdout: IO[str] | int = 1,
        stderr: IO[str] | int = 2,
        start_new_session: bool = False,
    ) -> None:
        self.arguments = arguments
        self.returncode: int | None = None
        self.stdout: IO[str] | None = None
        self._lock = threading.Lock()
        address = nursery_address()
        request = {
            "arguments": arguments,
            "folder": str(cwd),
            "environment": {**(os.environ if env is None else env), ADDRESS: address},
            "session": start_new_session,
        }
        with contextlib.ExitStack() as stack:
            nothing = stack.enter_context(Path(os.devnull).open())
            if stdout == subprocess.PIPE:
                reading, writing = os.pipe()
                self.stdout, stdout = os.fdopen(reading), stack.enter_context(os.fdopen(writing, "w"))
            stderr = stdout if stderr == subprocess.STDOUT else stderr
            files = [each if isinstance(each, int) else each.fileno() for each in (nothing, stdout, stderr)]
            self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._connection.connect(f"\0{address}")
            socket.send_fds(self._connection, [json.dumps(request).encode()], files)
            self.pid = int(self._connection.recv(32))

    def poll(self) -> int | None:
        """Return the exit status if the process has ended: that of a signal is its number, negative."""
        with self._lock:
            if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
                self.returncode = int(self._connection.recv(32) or "70")  # nothing comes if the nursery has died
                self._connection.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status once the process has ended. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            select.select([self._connection], [], [], timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run(
    *arguments: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    check: bool = False,
    timeout: float | None = None,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS...` to its end, as `subprocess.run` does with `capture_output`.

    It is forked from the nursery, unless it is to be `fresh`: in an interpreter of its own.
    """
    start = interpreter if fresh else Program
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        program = start(*arguments, cwd=cwd, env=env, stdout=output, stderr=errors)
        try:
            status = program.wait(timeout)
        finally:
            program.kill()
            program.wait()
        output.seek(0)
        errors.seek(0)
        done = subprocess.CompletedProcess(arguments, status, output.read(), errors.read())
    if check:
        assert status == 0, f"{' '.join(arguments)} ended with {status}:\n{done.stdout}\n{done.stderr}"
    return done
