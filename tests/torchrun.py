"""torchrun whose ranks are forked from the nursery: `python -m tests.torchrun ARGUMENTS...`, otherwise the real one."""

import os
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from tests.programs import Program
from tests.tasks import GATES


def fork(_: SubprocessHandler, args: tuple[str, ...], env: dict[str, str]) -> Program:
    """Start a rank, in a session of its own as torchrun's are; its pid is left where the tests look for it."""
    python, unbuffered, *arguments = args
    assert unbuffered == "-u", f"{python} {args}"
    rank = Program(*arguments, cwd=Path.cwd(), env=env, start_new_session=True)
    if folder := os.environ.get(GATES):
        (Path(folder) / f"pid-of-rank.{env['RANK']}").write_text(str(rank.pid))
    return rank


if __name__ == "__main__":
    SubprocessHandler._popen = fork  # type: ignore[assignment, method-assign]
    run.main()
