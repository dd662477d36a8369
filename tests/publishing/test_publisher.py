"""The publisher: what was handed over becomes a version, in the background, or an error that reaches the caller."""

import json
import logging
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from emaswap import (
    Architecture,
    Constant,
    DirectoryStore,
    EmaInfo,
    EmaswapError,
    Fenced,
    Manifest,
    ModelEMA,
    Publisher,
    PublishError,
    Schedule,
    ScheduleInfo,
    Short,
    Signature,
    Store,
    TensorField,
    open_store,
)
from emaswap.files.digest import digest_of
from emaswap.store.directory import Directory
from emaswap.store.keys import manifest_key, tensors_key
from emaswap.tensors import named_tensors
from emaswap.versions.probe import Probe
from tests.disk import fill, small_disk
from tests.models import Everything, Linear, Tokens
from tests.programs import run
from tests.serving import wait_for

ROWS = torch.linspace(-1, 1, 12).view(4, 3)


class Negated(Linear):
    """Has the state of `Linear` and answers otherwise."""

    def forward(self, rows: Tensor) -> Tensor:
        return -super().forward(rows)


class Hidden(nn.Module):
    """Its inputs and outputs stay what they are when its width changes."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.layers(rows)
        return out


class Worker:
    """A callback that tells when the publisher's thread is in it, and holds it there."""

    def __init__(self) -> None:
        self.manifests: list[Manifest] = []
        self.busy = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, manifest: Manifest) -> None:
        self.manifests.append(manifest)
        self.busy.set()
        assert self.go_on.wait(30)

    @property
    def steps(self) -> list[int]:
        """The steps that were published."""
        return [manifest.training.step for manifest in self.manifests]


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A callback that holds the publisher's thread; let go at the end in any case."""
    worker = Worker()
    yield worker
    worker.go_on.set()


def linear_publisher(
    store: Store,
    on_publish: Callable[[Manifest], None] | None = None,
    *,
    keep: int = 1000,
    grace_s: float = 60,
    strict: bool = False,
) -> Publisher:
    """A publisher of `Linear`s."""
    return Publisher(
        store,
        name="test",
        architecture=Architecture.of(Linear),
        probe=ROWS,
        keep=keep,
        grace_s=grace_s,
        on_publish=on_publish,
        strict=strict,
    )


def weights_of(store: DirectoryStore, version: int) -> dict[str, Tensor]:
    """A version's weights as a reader gets them, verified."""
    written = store.manifest(version).weights
    return store.tensors("weights", written).tensors


def damaged(value: float) -> Linear:
    """A module with one weight that is not finite."""
    module = Linear()
    with torch.no_grad():
        module.layer.weight[1, 2] = value
    return module


# -- publishing ----------------------------------------------------------------------------------------------------


def test_a_training_loop_publishes_with_five_lines(tmp_path: Path) -> None:
    """A path, a name, a factory and a probe are enough; the directory is made, and the EMA's weights are in it."""
    model = Linear()
    ema = ModelEMA(model)
    with Publisher(tmp_path / "store", name="net", architecture=Architecture.of(Linear), probe=ROWS) as publisher:
        for step in range(1, 4):
            ema.update(model)
            publisher.publish(ema, step=step)
    store = open_store(tmp_path / "store")
    manifest = store.manifest(store.newest())
    assert manifest.training.step == 3
    assert isinstance(store, DirectoryStore)
    assert torch.equal(weights_of(store, manifest.version)["layer.weight"], ema.ema.get_parameter("layer.weight"))


def test_a_version_is_what_the_weights_were_at_the_call(store: DirectoryStore, worker: Worker) -> None:
    """publish() returns while its work is still to be done, and what becomes of the weights then does not matter."""
    module = Linear()
    publisher = linear_publisher(store, worker)
    publisher.publish(module, step=1)
    assert worker.busy.wait(30)
    publisher.publish(module, step=2)
    assert worker.steps == [1]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    worker.go_on.set()
    publisher.close()
    written = weights_of(store, 2)
    assert all(torch.equal(written[name], tensor) for name, tensor in before.items())


def test_the_newest_copy_replaces_the_one_that_waits(store: DirectoryStore, worker: Worker) -> None:
    """While the publisher is busy, only the newest copy is kept, with its weights and its step."""
    modules = [Linear() for _ in range(4)]
    publisher = linear_publisher(store, worker)
    publisher.publish(modules[0], step=1)
    assert worker.busy.wait(30)
    for step, module in enumerate(modules[1:], start=2):
        publisher.publish(module, step=step)
    worker.go_on.set()
    publisher.close()
    assert worker.steps == [1, 4]
    assert torch.equal(weights_of(store, 2)["layer.weight"], modules[3].layer.weight)
    assert publisher.published == 2


def test_closing_publishes_what_is_pending(store: DirectoryStore, worker: Worker) -> None:
    """The last weights become a version even if the publisher is closed right after."""
    publisher = linear_publisher(store, worker)
    publisher.publish(Linear(), step=1)
    assert worker.busy.wait(30)
    publisher.publish(Linear(), step=2)
    worker.go_on.set()
    publisher.close()
    assert worker.steps == [1, 2]


def test_flushing_waits_for_the_newest_weights(store: DirectoryStore) -> None:
    """After flush() the newest weights are a version; with nothing to do it returns at once."""
    with linear_publisher(store) as publisher:
        publisher.flush()
        for step in range(1, 4):
            publisher.publish(Linear(), step=step)
            publisher.flush()
            assert store.manifest(store.newest()).training.step == step


def test_a_closed_publisher_refuses_to_publish(store: DirectoryStore) -> None:
    """Publishing after close() is an error, closing again is not."""
    publisher = linear_publisher(store)
    publisher.close()
    publisher.close()
    with pytest.raises(PublishError, match="closed"):
        publisher.publish(Linear())
    assert store.versions() == []


def test_publishing_does_not_disturb_training(store: DirectoryStore) -> None:
    """A module that is published keeps its mode, its gradients and what they are required for."""
    module = Everything().train()
    module(torch.randn(5, 6)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
    with Publisher(store, name="test", architecture=Architecture.of(Everything), probe=torch.randn(2, 6)) as publisher:
        publisher.publish(module)
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    after = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert len(gradients) == len(after)
    assert all(torch.equal(was, now) for was, now in zip(gradients, after, strict=True))


def random_states() -> list[object]:
    """Where the random numbers of Python, numpy and torch stand."""
    return [random.getstate(), str(np.random.get_state(legacy=True)), torch.get_rng_state().tolist()]


def test_publishing_draws_no_random_numbers(store: DirectoryStore) -> None:
    """A run that publishes drops out and shuffles as it would if it did not: that is what bit-exact resuming needs."""
    module = Linear()
    before = random_states()
    with linear_publisher(store) as publisher:
        publisher.publish(module)
        publisher.flush()
        publisher.publish(ModelEMA(module))
    assert store.versions() == [1, 2]
    assert random_states() == before


_SCRIPT = """
import sys
import torch
from emaswap import Publisher
from tests.models import Linear
publisher = Publisher(sys.argv[1], name="test", architecture="tests.models:Linear", probe=torch.ones(2, 3))
for step in range(1, 4):
    publisher.publish(Linear(), step=step)
"""


@pytest.mark.parametrize(
    ("ending", "status"), [("", 0), ("raise ValueError('training failed')", 1)], ids=["end of script", "uncaught error"]
)
def test_the_last_weights_are_published_although_nobody_closes(store: DirectoryStore, ending: str, status: int) -> None:
    """An interpreter that exits without close() finishes what it was handed first."""
    ended = run("-c", _SCRIPT + ending, str(store.root), timeout=60)
    assert ended.returncode == status, ended.stderr
    assert store.manifest(store.newest()).training.step == 3


# -- errors --------------------------------------------------------------------------------------------------------


def failed(publisher: Publisher, *, step: int, times: int = 1) -> None:
    """Publish a module with a weight that is not finite, and wait until that has failed."""
    publisher.publish(damaged(float("nan")), step=step)
    wait_for(lambda: publisher.failed == times, what="the failure")


def test_training_goes_on_when_a_publish_fails(store: DirectoryStore, caplog: pytest.LogCaptureFixture) -> None:
    """A failed publish is a warning, a count and `error`; the next one is published, and closing raises nothing."""
    with caplog.at_level(logging.WARNING), linear_publisher(store) as publisher:
        failed(publisher, step=1)
        assert "step 1 was not published" in caplog.text
        assert "step 1 was not published" in str(publisher.error)
        failed(publisher, step=2, times=2)
        publisher.publish(Linear(), step=3)
        publisher.flush()
        assert publisher.error is None
    assert (publisher.published, publisher.failed) == (1, 2)
    assert [store.manifest(version).training.step for version in store.versions()] == [3]


def test_what_cannot_be_copied_is_a_failed_publish(store: DirectoryStore) -> None:
    """A module that refuses to be copied ends training no more than a full disk does."""
    stubborn = Linear()
    stubborn.lock = threading.Lock()  # type: ignore[assignment]
    publisher = linear_publisher(store)
    publisher.publish(stubborn, step=1)
    assert publisher.failed == 1
    with pytest.raises(PublishError, match="step 1 was not published"):
        publisher.close()


@pytest.mark.parametrize("wait", [Publisher.flush, Publisher.close], ids=["flush", "close"])
def test_waiting_raises_when_the_newest_weights_were_not_published(
    store: DirectoryStore, wait: Callable[[Publisher], None]
) -> None:
    """flush() and close() raise the error once; `error` still holds it afterwards."""
    publisher = linear_publisher(store)
    publisher.publish(damaged(float("nan")), step=9)
    with pytest.raises(PublishError, match="step 9 was not published"):
        wait(publisher)
    publisher.close()
    assert "step 9 was not published" in str(publisher.error)


def test_leaving_the_block_raises_when_the_newest_weights_were_not_published(store: DirectoryStore) -> None:
    """A script does not end as if its last version had been published."""

    def script() -> None:
        with linear_publisher(store) as publisher:
            publisher.publish(Linear(), step=1)
            publisher.flush()
            publisher.publish(damaged(float("nan")), step=2)

    with pytest.raises(PublishError, match="step 2 was not published"):
        script()


def ends_by_an_error_in_a_block(publisher: Publisher) -> None:
    with publisher:
        publisher.publish(damaged(float("nan")))
        raise KeyError("training failed")


def ends_by_an_error_and_closes(publisher: Publisher) -> None:
    try:
        publisher.publish(damaged(float("nan")))
        raise KeyError("training failed")
    finally:
        publisher.close()


@pytest.mark.parametrize("script", [ends_by_an_error_in_a_block, ends_by_an_error_and_closes], ids=["with", "finally"])
def test_an_exception_that_is_under_way_is_not_hidden(
    store: DirectoryStore, script: Callable[[Publisher], None]
) -> None:
    """However an error in training closes the publisher, that error is the one that is raised."""
    publisher = linear_publisher(store)
    with pytest.raises(KeyError, match="training failed"):
        script(publisher)
    assert publisher.failed == 1


def test_a_strict_publisher_raises_at_the_next_call(store: DirectoryStore, worker: Worker) -> None:
    """The loop learns of a failed version when it publishes the next one, once, and loses nothing by it."""
    with linear_publisher(store, worker, strict=True) as publisher:
        publisher.publish(Linear(), step=1)
        assert worker.busy.wait(30)
        publisher.publish(damaged(float("nan")), step=2)
        worker.go_on.set()
        wait_for(lambda: publisher.failed, what="the failure")
        with pytest.raises(PublishError, match="step 2 was not published"):
            publisher.publish(Linear(), step=3)
        publisher.flush()
        publisher.publish(Linear(), step=4)
    assert [store.manifest(version).training.step for version in store.versions()] == [1, 3, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_that_are_not_finite_are_refused(store: DirectoryStore, value: float, dtype: torch.dtype) -> None:
    """They are refused with the tensor's name and advice, nothing is written, and the next version is published."""
    publisher = Publisher(
        store,
        name="test",
        architecture=Architecture(
            factory="tests.publishing.test_publisher:linear_of", arguments={"dtype": str(dtype).removeprefix("torch.")}
        ),
        probe=ROWS.to(dtype),
    )
    with publisher:
        publisher.publish(damaged(value).to(dtype))
        with pytest.raises(PublishError, match=r"not finite.*layer\.weight.*persistent=False"):
            publisher.flush()
        assert store.versions() == []
        assert store.files.entries("weights") == store.files.entries("probes") == {}
        publisher.publish(Linear().to(dtype))
    assert store.versions() == [1]


def linear_of(dtype: str = "float32") -> nn.Module:
    """A factory: `Linear` in a dtype."""
    return Linear().to(getattr(torch, dtype))


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture.of(Linear, outputs=3),
        Architecture.of(Negated),
        Architecture.of(Hidden),
        Architecture.of(Linear, depth=3),
        Architecture(factory="tests.models:Nowhere"),
        Architecture(factory="no.such.package:Linear"),
        Architecture(factory="builtins:dict"),
    ],
    ids=[
        "another shape",
        "other outputs",
        "other tensors",
        "arguments it does not take",
        "no such class",
        "no such package",
        "no module",
    ],
)
def test_a_factory_that_does_not_build_the_published_module_is_refused(
    store: DirectoryStore, architecture: Architecture
) -> None:
    """A mismatch that every service would reject is found at the first publish, before anything is written."""
    with pytest.raises(PublishError, match=f"{architecture.factory} (failed|does not build the module)"):
        with Publisher(store, name="test", architecture=architecture, probe=ROWS) as publisher:
            publisher.publish(Linear())
    assert store.versions() == []
    assert store.files.entries("weights") == {}


def test_a_module_that_has_changed_since_the_first_version_is_refused(store: DirectoryStore) -> None:
    """A module that the factory no longer builds is refused, even if the one before it was right."""
    with Publisher(store, name="test", architecture=Architecture.of(Hidden), probe=ROWS) as publisher:
        publisher.publish(Hidden(width=4))
        publisher.flush()
        publisher.publish(Hidden(width=5))
        with pytest.raises(PublishError, match="not a module like the ones published before"):
            publisher.flush()
    assert store.versions() == [1]


def test_a_module_of_another_class_answers_for_itself(store: DirectoryStore) -> None:
    """A module with the same tensors that answers otherwise is not taken for the one that was published before."""
    with linear_publisher(store) as publisher:
        publisher.publish(Linear())
        publisher.flush()
        publisher.publish(Negated())
        with pytest.raises(PublishError):
            publisher.flush()
    assert store.versions() == [1]


def test_a_full_disk_costs_a_version_and_no_more(tmp_path: Path) -> None:
    """Publishing to a full disk is an error that says so, shows nothing, and passes when there is space."""
    with small_disk(tmp_path / "disk", "256k") as disk:
        store = DirectoryStore(disk)
        with linear_publisher(store) as publisher:
            publisher.publish(Linear(), step=1)
            publisher.flush()
            filler = fill(disk)
            publisher.publish(Linear(), step=2)
            with pytest.raises(PublishError, match="step 2 was not published.*No space left on device"):
                publisher.flush()
            assert store.versions() == [1]
            assert store.files.entries("tmp") == {}
            filler.unlink()
            publisher.publish(Linear(), step=3)
        assert store.manifest(2).training.step == 3
        weights_of(store, 2)


def test_a_full_disk_is_pruned_and_tried_again(tmp_path: Path) -> None:
    """Where retention allows it, old versions make room for the new one, and nothing is lost."""
    with small_disk(tmp_path / "disk", "256k") as disk:
        store = DirectoryStore(disk)
        with linear_publisher(store) as publisher:
            for step in range(1, 9):
                publisher.publish(Linear(), step=step)
                publisher.flush()
        with linear_publisher(store, keep=2, grace_s=0) as publisher:
            fill(disk)
            publisher.publish(Linear(), step=9)
            publisher.flush()
            assert (publisher.published, publisher.failed) == (1, 0)
        assert store.manifest(9).training.step == 9
        weights_of(store, 9)
        weights_of(store, 8)


def test_a_new_publisher_starts_on_a_full_disk(tmp_path: Path) -> None:
    """It makes room before it takes its term, even where CURRENT must be written, and publishes."""
    with small_disk(tmp_path / "disk", "256k") as disk:
        store = DirectoryStore(disk)
        with linear_publisher(store) as publisher:
            for step in range(1, 9):
                publisher.publish(Linear(), step=step)
                publisher.flush()
        (disk / "CURRENT").unlink()
        fill(disk)
        with linear_publisher(store, keep=2, grace_s=0) as publisher:
            publisher.publish(Linear(), step=9)
        assert store.manifest(9).training.step == 9


def test_a_full_disk_that_cannot_be_pruned_is_tried_once_more(tmp_path: Path) -> None:
    """What retention keeps is not deleted for a new version; the error says that the disk is full."""
    with small_disk(tmp_path / "disk", "256k") as disk:
        store = DirectoryStore(disk)
        publisher = linear_publisher(store, keep=1, grace_s=3600)
        for step in (1, 2):
            publisher.publish(Linear(), step=step)
            publisher.flush()
        fill(disk)
        publisher.publish(Linear(), step=3)
        with pytest.raises(PublishError, match="step 3 was not published.*No space left on device"):
            publisher.close()
        assert store.versions() == [1, 2]


class Wide(nn.Module):
    """Its weights are many times as large as all else of a version."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 20_000)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.layer(rows)[:, :2]
        return out


def test_versions_that_come_to_nothing_use_up_no_room(tmp_path: Path) -> None:
    """Where the disk has room for weights, but not for their version, they do not stay behind and fill it."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        store = DirectoryStore(disk)
        publisher = Publisher(store, name="test", architecture=Architecture.of(Wide), probe=ROWS)
        publisher.publish(Wide())
        publisher.flush()
        filler = fill(disk)
        pages = -(-store.manifest(1).weights.size // 4096)
        os.truncate(filler, filler.stat().st_size - 4096 * pages)
        for _ in range(3):
            publisher.publish(Wide())
            with pytest.raises(PublishError, match="No space left on device"):
                publisher.flush()
            assert len(store.files.entries("weights")) == 1
        filler.unlink()
        publisher.publish(Wide(), step=7)
        publisher.close()
        assert store.manifest(2).training.step == 7


class Full(Directory):
    """A directory on a disk that has room for tensors, and none for manifests."""

    is_full = False

    def create(self, key: str, data: bytes) -> bool:
        if self.is_full:
            raise Short(f"cannot create {key}: No space left on device")
        return super().create(key, data)


def test_weights_that_another_version_names_stay_when_a_publish_fails(store: DirectoryStore) -> None:
    """What could not be published once more is an older version's, too."""
    files = Full(store.root)
    with linear_publisher(Store(files)) as publisher:
        module = Linear()
        publisher.publish(module)
        publisher.flush()
        files.is_full = True
        publisher.publish(module)
        with pytest.raises(PublishError):
            publisher.flush()
        weights_of(store, 1)
        publisher.publish(Linear())
        with pytest.raises(PublishError):
            publisher.flush()
        weights_of(store, 1)
        assert len(store.files.entries("weights")) == len(store.files.entries("probes")) == 1


# -- a store that was deleted --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made_again",
    [None, Path.mkdir, lambda root: DirectoryStore(root).prepare()],
    ids=["deleted", "an empty directory", "an empty store"],
)
def test_a_new_line_begins_where_the_store_was_deleted(
    store: DirectoryStore, made_again: Callable[[Path], None] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The publisher recreates the store, logs it, and publishes everything that follows."""
    with linear_publisher(store) as publisher:
        publisher.publish(Linear(), step=1)
        publisher.flush()
        publisher.publish(Linear(), step=2)
        publisher.flush()
        shutil.rmtree(store.root)
        if made_again:
            made_again(store.root)
        for step in (3, 4):
            publisher.publish(Linear(), step=step)
            publisher.flush()
        assert publisher.failed == 0
    assert "version 2 is not in" in caplog.text
    manifests = [store.manifest(version) for version in store.versions()]
    assert [(each.version, each.training.step) for each in manifests] == [(1, 3), (2, 4)]
    assert manifests[0].parent is None
    assert manifests[1].parent == digest_of(store.manifest_bytes(1))
    assert store.hint() == 2
    weights_of(store, 2)


def test_a_store_that_is_deleted_before_the_first_version_is_made_again(store: DirectoryStore) -> None:
    """A publisher that has published nothing yet recovers, too."""
    with linear_publisher(store) as publisher:
        shutil.rmtree(store.root)
        publisher.publish(Linear(), step=1)
    assert store.versions() == [1]


def test_a_store_from_a_backup_goes_on_behind_its_newest_version(store: DirectoryStore, tmp_path: Path) -> None:
    """Numbers go on where the restored store ends."""
    with linear_publisher(store) as publisher:
        for step in (1, 2, 3):
            publisher.publish(Linear(), step=step)
            publisher.flush()
            if step == 2:
                shutil.copytree(store.root, tmp_path / "backup")
        shutil.rmtree(store.root)
        shutil.copytree(tmp_path / "backup", store.root)
        publisher.publish(Linear(), step=4)
    assert [store.manifest(version).training.step for version in store.versions()] == [1, 2, 4]
    assert store.manifest(3).term == 2


def test_a_publisher_does_not_mix_with_another_in_a_store_that_was_started_anew(store: DirectoryStore) -> None:
    """A publisher that finds another run's versions in place of its own is fenced, and writes nothing."""
    older = linear_publisher(store)
    older.publish(Linear(), step=1)
    older.flush()
    older.publish(Linear(), step=2)
    older.flush()
    shutil.rmtree(store.root)
    with linear_publisher(store) as newer:
        newer.publish(Linear(), step=10)
        newer.flush()
        older.publish(Linear(), step=3)
        with pytest.raises(Fenced, match="was started anew"):
            older.flush()
        newer.publish(Linear(), step=11)
    assert [store.manifest(version).training.step for version in store.versions()] == [10, 11]


def test_a_callback_that_fails_is_not_taken_for_a_version_that_failed(store: DirectoryStore) -> None:
    """An error in on_publish surfaces, but does not say of a version that is in the store that it is not."""

    def fail(manifest: Manifest) -> None:
        raise ValueError(f"cannot announce version {manifest.version}")

    publisher = linear_publisher(store, fail)
    publisher.publish(Linear(), step=1)
    with pytest.raises(EmaswapError, match="cannot announce version 1") as caught:
        publisher.close()
    assert store.versions() == [1]
    assert "not published" not in str(caught.value)


# -- fencing -------------------------------------------------------------------------------------------------------


def test_a_fenced_publisher_stays_fenced(store: DirectoryStore) -> None:
    """Once another has taken over, every call raises Fenced and nothing more is published."""
    older = linear_publisher(store)
    older.publish(Linear())
    older.flush()
    with linear_publisher(store) as newer:
        newer.publish(Linear())
    older.publish(Linear())
    with pytest.raises(Fenced, match="taken over"):
        older.flush()
    calls: list[Callable[[], None]] = [lambda: older.publish(Linear()), older.flush, older.close]
    for call in calls:
        with pytest.raises(Fenced, match="taken over"):
            call()
    assert store.versions() == [1, 2]


# -- what a version says of itself ---------------------------------------------------------------------------------


def published(store: DirectoryStore, module: ModelEMA | nn.Module, **options: object) -> Manifest:
    """The manifest of one published module."""
    kind = type(module.ema if isinstance(module, ModelEMA) else module)
    step, metrics = options.pop("step", 0), options.pop("metrics", None)
    settings = {"name": "test", "architecture": Architecture.of(kind), "probe": ROWS, **options}
    with Publisher(store, **settings) as publisher:  # type: ignore[arg-type]
        publisher.publish(module, step=step, metrics=metrics)  # type: ignore[arg-type]
    return store.manifest(store.newest())


@pytest.mark.parametrize(
    ("decay", "schedule", "parameters", "window"),
    [
        (0.9, "exponential_ramp", {"decay": 0.9, "tau": 3.0}, 1 / (1 - 0.9 * (1 - 2.718281828459045 ** (-5 / 3)))),
        (Constant(0.75), "constant", {"decay": 0.75}, 4.0),
        (Constant(1.0), "constant", {"decay": 1.0}, None),
    ],
    ids=["ramp", "constant", "never moves"],
)
def test_the_averages_provenance_travels_with_the_version(
    store: DirectoryStore,
    decay: float | Schedule,
    schedule: str,
    parameters: Mapping[str, float],
    window: float | None,
) -> None:
    """Schedule with parameters, updates, effective window and dtype are in the manifest."""
    model = Linear()
    ema = ModelEMA(model, decay=decay, tau=3.0)
    for _ in range(5):
        ema.update(model)
    described = published(store, ema).ema
    assert described.schedule is not None
    assert described.schedule.model_dump() == {"name": schedule, **parameters}
    assert described.updates == 5
    assert described.dtype == "float32"
    assert described.window == (pytest.approx(window) if window is not None else None)


def test_a_plain_module_has_no_average_to_speak_of(store: DirectoryStore) -> None:
    """The provenance of weights that were not averaged says so."""
    described = published(store, Linear()).ema
    assert (described.schedule, described.updates) == (None, 0)


def test_an_average_of_another_library_is_described(store: DirectoryStore) -> None:
    """A description of a plain module stays with its version; with a `ModelEMA` it is refused."""
    model = Linear()
    averaged = EmaInfo(schedule=ScheduleInfo(name="polyak"), updates=7, window=2.0)
    with linear_publisher(store) as publisher:
        publisher.publish(model, averaged=averaged)
        publisher.flush()
        publisher.publish(model)
        with pytest.raises(ValueError, match="leave out averaged="):
            publisher.publish(ModelEMA(model), averaged=averaged)
    assert [store.manifest(version).ema for version in (1, 2)] == [averaged, EmaInfo()]


def test_a_plain_module_does_not_inherit_the_provenance_of_the_average_before_it(store: DirectoryStore) -> None:
    """Raw weights that are published after averaged ones are not called averaged."""
    model = Linear()
    ema = ModelEMA(model)
    ema.update(model)
    with linear_publisher(store) as publisher:
        publisher.publish(ema)
        publisher.flush()
        publisher.publish(model)
    averaged, plain = (store.manifest(version).ema.schedule for version in (1, 2))
    assert averaged is not None
    assert (averaged.name, plain) == ("exponential_ramp", None)
    assert store.manifest(2).ema.updates == 0


def test_step_and_metrics_travel_with_the_version(store: DirectoryStore) -> None:
    """What the loop says of its training is in the manifest, and a metric that is not finite is null there."""
    metrics = {"accuracy": 0.1 + 0.2, "steps": 3, "loss": float("nan"), "perplexity": float("inf")}
    manifest = published(store, Linear(), step=1234, metrics=metrics)
    assert manifest.training.step == 1234
    expected = {"accuracy": 0.1 + 0.2, "steps": 3.0, "loss": None, "perplexity": None}
    assert manifest.training.metrics == expected
    raw = json.loads((store.root / manifest_key(1)).read_text())
    assert raw["training"] == {"step": 1234, "metrics": expected}


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [("float64", 1e-9, 1e-10), ("float32", 1e-4, 1e-5), ("bfloat16", 5e-2, 2e-2), ("float16", 1e-2, 2e-3)],
)
def test_the_probes_tolerances_follow_from_the_weights_dtype(
    store: DirectoryStore, dtype: str, rtol: float, atol: float
) -> None:
    """Narrow numbers may differ more from machine to machine than wide ones."""
    manifest = published(
        store,
        linear_of(dtype),
        architecture=Architecture(factory="tests.publishing.test_publisher:linear_of", arguments={"dtype": dtype}),
        probe=ROWS.to(getattr(torch, dtype)),
    )
    assert (manifest.probe.rtol, manifest.probe.atol) == (rtol, atol)


def test_a_signature_follows_from_the_probe(store: DirectoryStore) -> None:
    """Without a signature, names, dtypes and shapes of one row are what the probe shows."""
    manifest = published(
        store,
        Tokens(),
        probe={"tokens": torch.tensor([[1, 2, 3], [4, 5, 6]]), "bias": torch.tensor([0.5, -0.5])},
    )
    assert manifest.signature == Signature(
        inputs=(TensorField(name="tokens", dtype="int64", shape=(3,)), TensorField(name="bias", shape=())),
        outputs=(TensorField(name="logits", shape=(3,)), TensorField(name="mean", shape=(4,))),
    )


def test_a_given_signature_is_taken_as_it_is(store: DirectoryStore) -> None:
    """Names, sizes that vary and labels are the publisher's to say."""
    signature = Signature(
        inputs=(TensorField(name="features", shape=(None,)),),
        outputs=(TensorField(name="logits", shape=(2,)),),
        labels=("cat", "dog"),
    )
    assert published(store, Linear(), signature=signature).signature == signature


def test_a_signature_that_the_probe_does_not_fit_is_an_error(store: DirectoryStore) -> None:
    """A signature that contradicts the probe is reported with what was expected and what came."""
    signature = Signature(
        inputs=(TensorField(name="rows", shape=(5,)),), outputs=(TensorField(name="out", shape=(2,)),)
    )
    with pytest.raises(PublishError, match=r"input 'rows'.*shape \(5\).*shape \(4, 3\)"):
        published(store, Linear(), signature=signature)
    assert store.versions() == []


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_digests_are_of_the_algorithm_that_was_asked_for(store: DirectoryStore, algorithm: str) -> None:
    """Weights and probe are named by digests of the publisher's algorithm, and are verified with it."""
    manifest = published(store, Linear(), algorithm=algorithm)
    assert manifest.weights.digest.startswith(f"{algorithm}:")
    assert manifest.probe.digest.startswith(f"{algorithm}:")
    weights_of(store, 1)


def test_a_manifest_lists_the_tensors_of_the_weights(store: DirectoryStore) -> None:
    """Every persistent tensor is listed with dtype and shape, a tied one once; what is not persistent is not there."""
    module = Everything()
    manifest = published(store, module, probe=torch.randn(2, 6))
    listed = {name: (info.dtype, info.shape) for name, info in manifest.weights.tensors.items()}
    assert listed == {
        "encode.weight": ("float32", (6, 6)),
        "norm.weight": ("float32", (6,)),
        "norm.bias": ("float32", (6,)),
        "norm.running_mean": ("float32", (6,)),
        "norm.running_var": ("float32", (6,)),
        "norm.num_batches_tracked": ("int64", ()),
        "steps": ("int64", ()),
    }
    assert weights_of(store, 1).keys() == listed.keys()
    assert manifest.weights.size == (store.root / tensors_key("weights", manifest.weights.digest)).stat().st_size


def test_all_that_a_state_is_made_of_comes_out_right(store: DirectoryStore) -> None:
    """Integer buffers are exact, batch norm's running figures are the average's, tied weights are one tensor."""
    model = Everything().train()
    ema = ModelEMA(model, decay=Constant(0.5))
    for _ in range(3):
        model(torch.randn(8, 6))
        with torch.no_grad():
            model.encode.weight.add_(torch.randn(6, 6))
        ema.update(model)
    published(store, ema, probe=torch.randn(2, 6))
    written = weights_of(store, 1)
    expected = named_tensors(ema.ema)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert written["steps"].item() == 3


def test_the_probe_records_the_averages_own_answers(store: DirectoryStore) -> None:
    """Recorded outputs equal, to the last bit, what the EMA model itself answers in eval mode, not the raw model."""
    torch.manual_seed(0)
    model = Everything().train()
    ema = ModelEMA(model, decay=Constant(0.9))
    for _ in range(3):
        model(torch.randn(8, 6))
        with torch.no_grad():
            model.encode.weight.add_(torch.randn(6, 6))
        ema.update(model)
    rows = torch.randn(4, 6)
    manifest = published(store, ema, probe=rows)
    probe = Probe.from_tensors(store.tensors("probes", manifest.probe).tensors)
    with torch.no_grad():
        answers, raw = ema.ema(rows), model.eval()(rows)
    assert torch.equal(probe.inputs["input"], rows)
    assert torch.equal(probe.outputs["output"], answers)
    assert not torch.allclose(raw, answers)


def test_a_buffer_that_is_not_persistent_and_not_what_the_factory_makes_is_noticed(store: DirectoryStore) -> None:
    """The weights do not carry such a buffer, so a service would answer otherwise: the first publish says so."""
    module = Everything()
    module.scale.fill_(3.0)
    with pytest.raises(PublishError, match="does not build the module"):
        published(store, module, probe=torch.randn(2, 6))
    assert store.versions() == []


def compiled(module: nn.Module) -> nn.Module:
    """The module as `torch.compile` wraps it."""
    wrapped = torch.compile(module, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled], ids=["DataParallel", "torch.compile"])
def test_a_wrapped_module_is_published_as_what_is_inside(
    store: DirectoryStore, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    """A wrapper for training leaves no trace in the version."""
    module = Linear()
    manifest = published(store, wrap(module), architecture=Architecture.of(Linear))
    assert manifest.weights.tensors.keys() == {"layer.weight", "layer.bias"}
    assert torch.equal(weights_of(store, 1)["layer.weight"], module.layer.weight)
