"""A process that forks the programs that tests run: `python -u -m tests.nursery ADDRESS`.

Importing torch and what is built on it takes seconds, and several times as long under coverage; a fork of a process that
has imported all of it takes milliseconds. `tests/programs.py` starts a nursery and asks it. A request comes over a
connection of its own, with the program's standard streams; the answers are the pid, and in the end the exit status.

A nursery never starts a thread or computes anything, since only the thread that forks lives on in the child.
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

ADDRESS = "TESTS_NURSERY"
REQUEST_BYTES = 2**18
IMPORTS = (
    "emaswap.cli",
    "service.web.app",
    "tests.hard_tasks",
    "tests.models",
    "tests.tasks",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "trainer.loop",
    "trainer.tasks.digits",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
)


class Child:
    """A process that was forked, and the connection over which its end is told."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self.handle = os.pidfd_open(pid)
        self.connection = connection

    def report(self) -> None:
        """Tell whoever asked for the process how it ended."""
        _, status = os.waitpid(self.pid, 0)
        with contextlib.suppress(OSError):  # nobody waits for it any more
            self.connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        self.close()

    def close(self) -> None:
        """Let go of the process."""
        os.close(self.handle)
        self.connection.close()


def serve(listener: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork a process for each request until standard input ends. Returns the request and its files in each child."""
    with listener, selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        children: set[Child] = set()
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if child := key.data:
                    selector.unregister(child.handle)
                    child.report()
                    children.remove(child)
                    continue
                connection, _ = listener.accept()
                message, files, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 3)
                pid = os.fork()
                if not pid:
                    connection.close()
                    for child in children:
                        child.close()
                    return json.loads(message), files
                for file in files:
                    os.close(file)
                connection.send(str(pid).encode())
                children.add(child := Child(pid, connection))
                selector.register(child.handle, selectors.EVENT_READ, child)


def become(request: dict[str, Any], files: list[int]) -> None:
    """Run the program as an interpreter of its own would: `-m MODULE` or `-c CODE`, and its arguments."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    kind, program, *arguments = request["arguments"]
    sys.argv = [kind, *arguments]
    sys.path[0] = request["folder"]
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        assert kind == "-c", f"a program is -m MODULE or -c CODE, not {kind}"
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(program, vars(main))


def finish(program: Callable[[], object]) -> NoReturn:
    """Run a program, wait for its threads, let it say goodbye, and end with its status.

    That is how an interpreter ends, except that it would then take all of torch apart, for half a second or more.
    """
    status = 0
    try:
        program()
    except SystemExit as ending:
        if isinstance(ending.code, int):
            status = ending.code
        elif ending.code is not None:
            print(ending.code, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started the tests
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0{sys.argv[1]}")
    listener.listen()
    print("listening", flush=True)
    for name in IMPORTS:
        __import__(name)
    gc.collect()
    gc.freeze()
    asked = serve(listener)
    finish(functools.partial(become, *asked) if asked else lambda: None)
