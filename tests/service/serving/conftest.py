"""What several tests of serving need."""

from collections.abc import Iterator

import pytest

from tests.faulty_models import hang


@pytest.fixture
def hanging() -> Iterator[None]:
    """Forward passes may hang in this test; afterwards they are let go."""
    hang.over.clear()
    yield
    hang.over.set()
