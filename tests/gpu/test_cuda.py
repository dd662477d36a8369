"""What runs on a CUDA device, from the average to the answer. Skipped where there is none."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from emaswap import Architecture, Constant, DirectoryStore, EmaError, ModelEMA, Publisher
from service.__main__ import main
from tests.models import Linear
from tests.service.web.test_predict import put
from tests.serving import serve, wait_for
from tests.trainer.test_trainer import train_here

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

ROWS = torch.linspace(-1, 1, 12).view(4, 3)


def _trained(model: nn.Module, ema: ModelEMA, steps: int = 20) -> None:
    """Change the weights, the same way each time, and average them."""
    for step in range(steps):
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.add_(0.01 * (step + number + 1))
        ema.update(model)


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_an_average_of_cuda_weights_is_that_of_the_same_weights(where: str) -> None:
    """Kept on the device or on the CPU, it is what a CPU makes of them."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    on_cpu = ModelEMA(model, decay=Constant(0.9))
    twin = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    twin.load_state_dict(model.state_dict())
    twin.cuda()
    on_cuda = ModelEMA(twin, decay=Constant(0.9), device=where)
    _trained(model, on_cpu)
    _trained(twin, on_cuda)
    for name, expected in on_cpu.ema.state_dict().items():
        found = on_cuda.ema.state_dict()[name]
        assert found.device.type == where
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_the_guard_leaves_nans_out_on_the_device() -> None:
    """Nothing waits for its answer, and the average stays finite."""
    model = nn.Linear(64, 64).cuda()
    ema = ModelEMA(model, decay=Constant(0.5))
    before = ema.ema.state_dict()["weight"].clone()
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    ema.update(model)
    assert torch.equal(ema.ema.state_dict()["weight"], before)
    assert ema.skipped == 1


def test_an_average_can_be_moved_to_the_device_and_back() -> None:
    """It goes on averaging wherever it is."""
    model = nn.Linear(8, 8)
    ema = ModelEMA(model, decay=Constant(0.5)).to("cuda")
    ema.update(model)
    assert all(tensor.is_cuda for tensor in ema.ema.state_dict().values())
    ema.to("cpu").update(model)
    assert not any(tensor.is_cuda for tensor in ema.ema.state_dict().values())
    with pytest.raises(EmaError, match="cuda:99"):
        ModelEMA(model, device="cuda:99")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_was_published_from_the_device_is_served(store: DirectoryStore, device: str) -> None:
    """A version of CUDA weights passes its proof on either device, and answers as the module does."""
    module = Linear().cuda()
    manifest = put(store, module, ROWS)
    with serve(store=str(store.root), device=device) as served:
        served.wait_until_live(manifest.version)
        answer = served.predict(ROWS.tolist())
        expected = module.eval()(ROWS.cuda()).cpu()
        torch.testing.assert_close(torch.tensor(answer.json()["outputs"]), expected, rtol=1e-4, atol=1e-4)


def test_swaps_on_the_device_fail_nobody(store: DirectoryStore) -> None:
    """Versions follow each other while a client asks; each answer is the version's own."""
    module = Linear().cuda()
    answers = {}
    with Publisher(store, name="test", architecture=Architecture.of(Linear), probe=ROWS) as publisher:
        publisher.publish(module)
        publisher.flush()
        answers[1] = module(ROWS.cuda()).detach().cpu()
        with serve(store=str(store.root), device="cuda", poll_s=0.05, guard_s=0.2) as served:
            served.wait_until_live(1)
            for version in itertools.count(2):
                if version > 20:
                    break
                with torch.no_grad():
                    module.layer.weight.add_(0.1)
                answers[version] = module(ROWS.cuda()).detach().cpu()
                publisher.publish(module)
                publisher.flush()

                def arrived(version: int = version) -> bool:
                    answer = served.predict(ROWS.tolist())
                    seen = int(answer.headers["X-Model-Version"])
                    outputs = torch.tensor(answer.json()["outputs"])
                    torch.testing.assert_close(outputs, answers[seen], rtol=1e-4, atol=1e-4)
                    return seen == version

                wait_for(arrived, what=f"version {version}")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_the_device_publishes(tmp_path: Path, precision: str) -> None:
    """The trainer trains, averages and publishes on the device in each precision."""
    flags = ["--device", "cuda", "--precision", precision, "--steps", "20", "--publish-every", "10"]
    assert train_here(tmp_path / "store", *flags) == 0
    assert DirectoryStore(tmp_path / "store").newest() == 2


def test_one_worker_has_the_device(store: DirectoryStore, capsys: pytest.CaptureFixture[str]) -> None:
    """More of them are refused with the reason, and what to do."""
    assert main(["--store", str(store.root), "--device", "cuda", "--workers", "2"]) == 1
    assert "use --workers 1" in capsys.readouterr().err
