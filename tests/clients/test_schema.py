"""What Schemathesis makes of the OpenAPI document: thousands of requests that the schema allows, or just does not."""

import subprocess
from pathlib import Path

import pytest

from emaswap import DirectoryStore
from tests.clients.test_open_inference import PYTHON
from tests.models import Linear
from tests.service.web.test_predict import ROWS, put
from tests.serving import ServiceProcess
from tests.soak import WHOLE

pytestmark = pytest.mark.clients


@pytest.mark.skipif(not PYTHON.exists(), reason="needs the environment that `make test-clients` makes")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", [1, 2])
def test_every_request_gets_a_documented_answer(store: DirectoryStore, tmp_path: Path, workers: int) -> None:
    """No 5xx, no status or content that is not documented; afterwards the service answers as before, and is no larger."""
    (tmp_path / "token").write_text("correct horse")
    put(store, Linear(), ROWS)
    flags = ["--workers", str(workers), "--admin-token-file", str(tmp_path / "token")]
    with ServiceProcess(store.root, *flags) as service:
        before = service.predict([[1, 2, 3]]).json()
        done = subprocess.run(
            [
                *(PYTHON.with_name("schemathesis"), "run", f"{service.url}/openapi.json", "--no-color"),
                *("--header", "Authorization: Bearer correct horse", "--seed", "1"),
                # What fits the schema need not fit the model, whose shapes no schema knows.
                *("--exclude-checks", "positive_data_acceptance", "--max-examples", "1000" if WHOLE else "30"),
            ],
            capture_output=True, text=True, timeout=1100, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:]
        assert service.predict([[1, 2, 3]]).json() == before
        assert not [line for line in service.lines if "Traceback" in line or '"exception"' in line]
