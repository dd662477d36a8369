"""A publisher as a process of its own: `python -m tests.publisher_process STORE VERSIONS`.

Publishes a network whose every weight is the number of its version, as fast as the store takes it, and prints each
version with its digest, below a heading that says that it begins.
"""

import sys

import torch

from emaswap import Architecture, Manifest, Publisher
from tests.models import Everywhere


def publish(location: str, versions: int) -> None:
    """Publish so many versions, keeping only a few of them, so that a reader also loses files under its hands."""
    print("version digest", flush=True)

    def say(manifest: Manifest) -> None:
        print(manifest.version, manifest.weights.digest, flush=True)

    with Publisher(
        location,
        name="everywhere",
        architecture=Architecture.of(Everywhere),
        probe=torch.zeros(1, 2),
        keep=3,
        grace_s=0,
        on_publish=say,
    ) as publisher:
        first = publisher.store.newest() + 1
        for version in range(first, first + versions):
            publisher.publish(Everywhere(value=version), step=version)
            publisher.flush()


if __name__ == "__main__":
    publish(sys.argv[1], int(sys.argv[2]))
