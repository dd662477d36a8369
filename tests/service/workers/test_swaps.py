"""Thousands of swaps under load, over the network: nothing fails, nothing is mixed, nothing goes back, nothing grows."""

import pytest
import torch

from emaswap import Architecture, DirectoryStore, Publisher
from tests.crew import Crew, asked, memory
from tests.models import Linear
from tests.serving import wait_for
from tests.soak import record, times


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [1, 4])
def test_thousands_of_swaps(store: DirectoryStore, workers: int) -> None:
    """Each version is asked for by clients on several connections; memory after all of them is what it was early on."""
    swaps = times(10_000)
    module = Linear()
    with Publisher(
        store, name="test", architecture=Architecture.of(Linear), probe=torch.ones(2, 3), keep=3, grace_s=0
    ) as publisher:
        publisher.publish(module)
        publisher.flush()
        with (
            Crew(store.root, "--guard-s", "0.5", workers=workers, fresh=True) as crew,
            asked(crew, clients=4) as (watch, clients),
        ):
            early = 0
            for version in range(2, swaps + 2):
                with torch.no_grad():
                    module.layer.weight.normal_()
                publisher.publish(module)
                publisher.flush()
                wait_for(lambda version=version: watch.newest >= version, what=f"version {version}")  # type: ignore[misc]
                if version == swaps // 5:
                    early = memory(crew)
            late = memory(crew)
            watch.over.set()
            for client in clients:
                client.join()
            answers = sum(len(client.answers) for client in clients)
            failures = [failure for client in clients for failure in client.failures]
            assert not failures
            assert not watch.back
            assert crew.metric('emaswap_requests_total{status="200"}') == answers
            assert crew.metric("emaswap_swaps_total") == swaps + 1
            assert crew.process.poll() is None
    assert late <= 1.05 * early, (early, late)
    record(f"swaps with {workers} workers", swaps=swaps, answers=answers, failed=0, went_back=0, growth=late / early)
