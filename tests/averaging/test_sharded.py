"""Averages of models that several processes train: in shards (FSDP2), or each the whole (DDP, compiled)."""

import json

import pytest

from tests.programs import Program
from tests.shards import CHECKS, RANKS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What came of each check on each rank, all tried in one group of real processes."""
    folder = tmp_path_factory.mktemp("ranks")
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(RANKS)]
    ranks = [
        Program("-m", "tests.shards", str(rank), str(folder), stdout=log, stderr=log) for rank, log in enumerate(logs)
    ]
    try:
        for rank, log in zip(ranks, logs, strict=True):
            code = rank.wait(timeout=120)
            log.seek(0)
            assert code == 0, log.read()
    finally:
        for rank, log in zip(ranks, logs, strict=True):
            rank.kill()
            rank.wait()
            log.close()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("check", CHECKS)
def test_on_every_rank(outcomes: list[dict[str, str]], check: str) -> None:
    """What `tests/shards.py` says of each check holds on all ranks."""
    for rank, outcome in enumerate(outcomes):
        assert not outcome[check], f"rank {rank}: {outcome[check]}"
