"""The Open Inference Protocol as its own clients speak it. They have an environment of their own: `make test-clients`."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from emaswap import DirectoryStore
from tests.models import Linear
from tests.service.web.test_predict import ROWS, put
from tests.serving import ROOT, ServiceProcess

pytestmark = pytest.mark.clients

PYTHON = Path(os.environ.get("CLIENTS", ROOT / ".venv-clients")) / "bin" / "python"


@pytest.mark.skipif(not PYTHON.exists(), reason="needs the environment that `make test-clients` makes")
def test_real_clients_are_answered(store: DirectoryStore) -> None:
    """Metadata, inference as JSON and as bytes, errors in words, and many requests at once."""
    module = Linear()
    put(store, module, ROWS)
    with ServiceProcess(store.root) as service:
        done = subprocess.run(
            [PYTHON, Path(__file__).with_name("ask.py"), service.url, "test"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    expected = module.eval()(torch.tensor(told["rows"])).detach()
    for client in ("triton", "kserve"):
        asked = told[client]
        assert asked["live"]
        assert asked["ready"]
        assert asked["model_ready"]
        for outputs in asked["outputs"]:
            torch.testing.assert_close(torch.tensor(outputs).view_as(expected), expected, rtol=1e-6, atol=1e-6)
    triton = told["triton"]
    assert not triton["other_ready"]
    assert triton["server"]["name"] == "emaswap"
    assert triton["metadata"]["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3]}]
    assert triton["index"] == [{"name": "test", "version": "1", "state": "READY", "reason": ""}]
    assert triton["response"]["id"] == "7"
    assert triton["response"]["model_version"] == triton["named_version"] == "1"
    assert triton["response"]["parameters"]["digest"].startswith("blake3:")
    assert triton["alike"]
    unknown_model, unknown_version, wrong_shape = triton["errors"]
    assert "[404] unknown_model: expected the model 'test'" in unknown_model
    assert "[404] unknown_version: version '99' is not live" in unknown_version
    assert "[422] wrong_shape: input 'input'" in wrong_shape
    assert "unknown_model" in told["kserve"]["error"]
