"""The servable: it runs its own module, one thread at a time, and gives away nothing that the module still writes to."""

import threading
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from emaswap import BadVersion, DirectoryStore
from emaswap.versions.probe import Probe
from service.serving.servable import Servable
from tests.conftest import Publish
from tests.faulty_models import Overwriting
from tests.models import Linear
from tests.service.web.test_predict import put

ROWS = torch.linspace(-1, 1, 12).view(4, 3)
OTHER_ROWS = ROWS * 2


@pytest.fixture
def servable(publish: Publish) -> Servable:
    """A servable of a version that was really published, with its own probe."""
    module = Linear().eval()
    manifest = publish(module)
    probe = Probe.record(module, manifest.signature, ROWS)
    return Servable(
        manifest=manifest, module=module, probe=probe, device=torch.device("cpu"), loaded_at=datetime.now(UTC)
    )


def test_a_servable_that_answers_as_ever_is_proven(servable: Servable) -> None:
    """Proving it again raises nothing, and says what is wrong once its weights have changed."""
    servable.prove()
    with torch.no_grad():
        servable.module.get_parameter("layer.bias").add_(1)
    with pytest.raises(BadVersion, match="probe_mismatch"):
        servable.prove()


def test_the_own_probe_need_not_run(servable: Servable) -> None:
    """Asked what its own probe asks, a servable answers from what was recorded, even while it is busy."""
    with servable._turn:
        answers = servable.answers_to(Probe({"input": ROWS.clone()}, {}), wait_s=0)
    assert answers is not None
    torch.testing.assert_close(answers["output"], servable.module(ROWS))


def test_another_probe_runs_in_turn(servable: Servable) -> None:
    """Another version's probe waits for the module until its time is up, and is answered when the module is free."""
    probe = Probe({"input": OTHER_ROWS}, {})
    with servable._turn:
        assert servable.answers_to(probe, wait_s=0.01) is None
    answers = servable.answers_to(probe)
    assert answers is not None
    torch.testing.assert_close(answers["output"], servable.module(OTHER_ROWS))


def test_a_probe_that_does_not_fit_has_no_answers(servable: Servable) -> None:
    """What another version's probe asks in vain is no error of this one."""
    assert servable.answers_to(Probe({"input": torch.ones(2, 5)}, {})) is None
    servable.run({"input": np.ones((1, 3), np.float32)})


def test_runs_wait_for_each_other(servable: Servable) -> None:
    """A run, a proof and another's probe never overlap, whichever threads they are on."""
    inside, most = 0, 0

    def enter(*_: object) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.001)

    def leave(*_: object) -> None:
        nonlocal inside
        inside -= 1

    servable.module.register_forward_pre_hook(enter)
    servable.module.register_forward_hook(leave)
    rows = {"input": np.ones((1, 3), np.float32)}
    probe = Probe({"input": OTHER_ROWS}, {})
    jobs = [lambda: servable.run(rows), servable.prove, lambda: servable.answers_to(probe)]
    threads = [threading.Thread(target=lambda job=job: [job() for _ in range(10)]) for job in jobs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_answers_are_copies(store: DirectoryStore) -> None:
    """What a run gave stays as it is when the module writes its next answer over it."""
    module = Overwriting().eval()
    manifest = put(store, module, ROWS)
    probe = Probe.record(module, manifest.signature, ROWS)
    servable = Servable(
        manifest=manifest, module=module, probe=probe, device=torch.device("cpu"), loaded_at=datetime.now(UTC)
    )
    first = servable.run({"input": np.ones((2, 3), np.float32)})
    other = servable.answers_to(Probe({"input": torch.full((2, 3), 5.0)}, {}))
    servable.run({"input": np.zeros((2, 3), np.float32)})
    assert (first["output"] == 1).all()
    assert other is not None
    assert (other["output"] == 5).all()
