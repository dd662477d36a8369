"""Several averages of a model in one version, averages rounded for the store, and batch norm measured anew."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner, Result

from emaswap import Architecture, BadVersion, Constant, DirectoryStore, ModelEMA, Publisher, PublishError, Reason
from emaswap.averaging.recalibration import recalibrate
from emaswap.cli import app
from emaswap.models.digits import DigitsNet
from emaswap.publishing.snapshot import PrivateCopy, Staging
from tests.models import Everything, Linear
from tests.serving import ServiceProcess, serve

VARIANTS = {"short": Constant(0.5), "long": Constant(0.9)}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def moved(model: nn.Module, ema: ModelEMA, updates: int = 3) -> None:
    """Some updates of weights that move."""
    for number in range(updates):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(number + 1)
        ema.update(model)


def published(store: DirectoryStore, **options: object) -> ModelEMA:
    """A version of a small network with two variants."""
    model = Linear()
    ema = ModelEMA(model, decay=Constant(0.0), variants=VARIANTS)
    moved(model, ema)
    architecture = Architecture.of(Linear)
    with Publisher(store, name="linear", architecture=architecture, probe=torch.ones(2, 3), **options) as publisher:  # type: ignore[arg-type]
        publisher.publish(ema, step=3)
    return ema


def verify(store: DirectoryStore) -> Result:
    """`emaswap verify` of every version."""
    return CliRunner().invoke(app, ["verify", "--store", str(store.root), "--trust", "tests.models.*"])


# -- variants ------------------------------------------------------------------------------------------------------


def test_variants_are_published_with_the_version(store: DirectoryStore) -> None:
    """Each variant has weights, a probe and a provenance of its own beside the main average's."""
    ema = published(store)
    manifest = store.manifest(1)
    described = {"": manifest.ema, **{name: variant.ema for name, variant in manifest.variants.items()}}
    decays = {name: info.schedule.model_dump()["decay"] for name, info in described.items() if info.schedule}
    assert decays == {"": 0.0, "short": 0.5, "long": 0.9}
    for name, module in ema.variants.items():
        variant = manifest.of_variant(name)
        tensors = store.tensors("weights", variant.weights).tensors
        torch.testing.assert_close(tensors, dict(module.state_dict()), rtol=0, atol=0)
    assert len({manifest.weights.digest, *(each.weights.digest for each in manifest.variants.values())}) == 3


def test_verify_proves_every_variant(store: DirectoryStore) -> None:
    """`emaswap verify` finds a flipped bit in the weights of a variant, too."""
    published(store)
    assert verify(store).exit_code == 0
    digest = store.manifest(1).variants["long"].weights.digest
    path = store.root / "weights" / f"{digest.replace(':', '-')}.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    result = verify(store)
    assert result.exit_code == 1
    assert Reason.DIGEST_MISMATCH in result.output


def test_retention_keeps_and_prunes_variants_with_their_version(store: DirectoryStore) -> None:
    """What is left of pruned versions are the files of those that are kept."""
    model = Linear()
    ema = ModelEMA(model, decay=Constant(0.0), variants=VARIANTS)
    with Publisher(
        store, name="linear", architecture=Architecture.of(Linear), probe=torch.ones(1, 3), keep=1, grace_s=0
    ) as publisher:
        for step in range(4):
            moved(model, ema)
            publisher.publish(ema, step=step)
            publisher.flush()
    newest = store.manifest(4)
    digests = [newest.weights.digest, *(variant.weights.digest for variant in newest.variants.values())]
    expected = {f"{digest.replace(':', '-')}.safetensors" for digest in digests}
    assert store.files.entries("weights").keys() == expected


def test_a_service_serves_the_variant_that_it_is_told_to(store: DirectoryStore) -> None:
    """`--variant long` answers with that average's weights, and names their digest."""
    ema = published(store)
    with ServiceProcess(store.root, "--variant", "long") as served:
        answer = served.predict([[1.0, 2.0, 3.0]]).json()
    expected = ema.variants["long"](torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(torch.tensor(answer["outputs"]), expected, rtol=0, atol=0)
    assert answer["model"]["digest"] == store.manifest(1).variants["long"].weights.digest


def test_a_version_without_the_variant_is_rejected(store: DirectoryStore) -> None:
    """The reason names the variants that there are."""
    published(store)
    with serve(store=str(store.root), variant="huge") as served:
        state = served.wait_until_rejected(1)
    assert state["reason"] == Reason.VARIANT_MISSING
    with pytest.raises(BadVersion, match="its variants: short, long"):
        store.manifest(1).of_variant("huge")


# -- rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_stored_rounded_and_served_as_recorded(store: DirectoryStore, dtype: torch.dtype) -> None:
    """Half the bytes; the probe has the answers of the rounded weights, and the average itself is not rounded."""
    model = Everything()
    ema = ModelEMA(model, decay=Constant(0.3))
    moved(model, ema)
    before = {name: tensor.clone() for name, tensor in ema.ema.state_dict().items()}
    architecture = Architecture.of(Everything)
    with Publisher(
        store, name="everything", architecture=architecture, probe=torch.ones(2, 6), dtype=dtype
    ) as publisher:
        publisher.publish(ema)
    torch.testing.assert_close(dict(ema.ema.state_dict()), before, rtol=0, atol=0)
    manifest = store.manifest(1)
    parameters = dict(model.named_parameters())
    for name, info in manifest.weights.tensors.items():
        wide = parameters[name].dtype if name in parameters else before[name].dtype
        assert info.dtype == str(dtype if name in parameters else wide).removeprefix("torch.")
    assert verify(store).exit_code == 0
    assert manifest.ema.dtype == "float32"


# -- calibration ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 4), st.integers(2, 5))
def test_recalibrated_statistics_are_those_of_the_batches(batches: int, rows: int) -> None:
    """Mean and variance of what goes into a batch norm, averaged over batches; momentum and mode are as before."""
    norm = nn.BatchNorm1d(3, momentum=0.3)
    module = nn.Sequential(nn.Dropout(0.5), norm).eval()
    given_batches = [torch.randn(rows, 3) * 4 + 2 for _ in range(batches)]
    state = torch.get_rng_state()
    recalibrate(module, given_batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert (norm.momentum, norm.training) == (0.3, False)
    means = torch.stack([batch.mean(0) for batch in given_batches])
    variances = torch.stack([batch.var(0) for batch in given_batches])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, means.mean(0))
    torch.testing.assert_close(norm.running_var, variances.mean(0))


def test_a_module_without_batch_norm_is_not_run() -> None:
    """Nothing is drawn from the batches then."""
    recalibrate(nn.Linear(2, 2), (pytest.fail("the batches were asked for") for _ in range(1)))


def test_what_is_published_is_recalibrated_and_the_average_is_not(store: DirectoryStore) -> None:
    """The publisher's private copy gets the new statistics; its probe is answered with them."""
    ema = ModelEMA(DigitsNet(), decay=Constant(0.9))
    before = {name: tensor.clone() for name, tensor in ema.ema.state_dict().items()}
    batches = [torch.rand(16, 1, 8, 8)]
    with Publisher(
        store,
        name="digits",
        architecture=Architecture.of(DigitsNet),
        probe=torch.rand(2, 1, 8, 8),
        calibrate=partial(recalibrate, batches=batches),
    ) as publisher:
        publisher.publish(ema)
    torch.testing.assert_close(dict(ema.ema.state_dict()), before, rtol=0, atol=0)
    recalibrate(ema.ema, batches)
    stored = store.tensors("weights", store.manifest(1).weights).tensors
    torch.testing.assert_close(stored, dict(ema.ema.state_dict()), rtol=0, atol=0)


def test_a_failing_calibration_is_a_failed_publish(store: DirectoryStore) -> None:
    """What the hook raises reaches the training loop as a `PublishError`, and nothing is published."""

    def broken(_: nn.Module) -> None:
        raise RuntimeError("no batches today")

    publisher = Publisher(
        store, name="linear", architecture=Architecture.of(Linear), probe=torch.ones(1, 3), calibrate=broken
    )
    publisher.publish(Linear())
    with pytest.raises(PublishError, match="no batches today"):
        publisher.close()
    assert store.versions() == []


# -- snapshots from a GPU ------------------------------------------------------------------------------------------


@pytest.mark.cuda
@needs_cuda
def test_a_snapshot_from_cuda_has_the_weights_of_its_instant() -> None:
    """Updates that follow at once do not reach into a snapshot that is still on its way."""
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(16))).cuda()
    ema = ModelEMA(model, decay=Constant(0.0))
    snapshot, staging = PrivateCopy({}), Staging()
    for number in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        ema.update(model)
        snapshot.take(ema, snapshot.training, staging)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(-1)
        ema.update(model)
        snapshot.wait()
        assert all(bool((tensor == number).all()) for tensor in snapshot.modules[""].state_dict().values())
