"""The service over HTTP: one version after another."""

from tests.conftest import Publish
from tests.serving import Served


def test_each_answer_names_the_version_that_made_it(served: Served, publish: Publish) -> None:
    """Publishing makes the next version answer, and it says so."""
    for _ in range(3):
        manifest = publish()
        served.wait_until_live(manifest.version)
        answer = served.predict([[1.0, 2.0, 3.0]])
        assert answer.status_code == 200, answer.text
        model = answer.json()["model"]
        assert model["version"] == manifest.version == int(answer.headers["X-Model-Version"])
        assert model["digest"] == manifest.weights.digest == answer.headers["X-Model-Digest"]
