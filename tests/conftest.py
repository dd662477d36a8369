"""Fixtures: a store in a directory, publishing into it, and real services over it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn

from emaswap import Architecture, DirectoryStore, Manifest, Publisher, Signature
from tests.models import Linear
from tests.nursery import ADDRESS
from tests.programs import nursery_address
from tests.serving import Served, serve

torch.set_num_threads(1)
# How long an example takes depends on what else the machine does.
settings.register_profile("emaswap", deadline=None)
settings.load_profile("emaswap")


def pytest_configure(config: pytest.Config) -> None:
    """Start the nursery that all workers share, where there are workers."""
    if config.getoption("numprocesses", None):
        os.environ[ADDRESS] = nursery_address()


Publish = Callable[..., Manifest]


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    """An empty store that is ready for writing."""
    store = DirectoryStore(tmp_path / "store")
    store.prepare()
    return store


@pytest.fixture
def publish(store: DirectoryStore) -> Iterator[Publish]:
    """Publishes a module (by default a `Linear` with fresh weights) as the next version, and returns its manifest."""
    manifests: list[Manifest] = []
    publishers: dict[str, Publisher] = {}

    def publish(module: nn.Module | None = None, *, signature: Signature | None = None, step: int = 0) -> Manifest:
        module = Linear() if module is None else module
        name = type(module).__qualname__
        if name not in publishers:
            rows = torch.linspace(-1, 1, 12).view(4, 3) if isinstance(module, Linear) else torch.ones(2, 1)
            publishers[name] = Publisher(
                store,
                name="test",
                architecture=Architecture.of(type(module)),
                signature=signature,
                probe=rows,
                keep=1000,
                on_publish=manifests.append,
            )
        publishers[name].publish(module, step=step)
        publishers[name].flush()
        return manifests[-1]

    yield publish
    for publisher in publishers.values():
        publisher.close()


@pytest.fixture
def served(store: DirectoryStore, tmp_path: Path) -> Iterator[Served]:
    """A service over the store, in a thread of this process, that trusts the tests' models and has an admin token."""
    token = tmp_path / "token"
    token.write_text("correct horse\n")
    with serve(store=str(store.root), admin_token_file=token, poll_s=0.05) as served:
        yield served
