"""A process that forks publishers: `python -m tests.nursery STORE`, one for each line of its standard input.

Importing torch takes a second; a fork of a process that has imported it takes milliseconds. Prints each publisher's pid,
and waits for its end before it forks the next.
"""

import os
import sys

import torch

from emaswap import Architecture, Publisher
from tests.models import Everywhere


def publish_for_ever(location: str) -> None:
    """Publish one version after another, as fast as the store takes them, until killed."""
    torch.set_num_threads(1)
    with Publisher(
        location,
        name="everywhere",
        architecture=Architecture.of(Everywhere),
        probe=torch.zeros(1, 2),
        keep=3,
        grace_s=0,
    ) as publisher:
        while True:
            publisher.publish(Everywhere(value=publisher.published))
            publisher.flush()


if __name__ == "__main__":
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            publish_for_ever(sys.argv[1])
        print(pid, flush=True)
        os.waitpid(pid, 0)
