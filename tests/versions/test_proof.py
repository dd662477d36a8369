"""The proof: what a version must answer before it is believed."""

import pytest
import torch

from emaswap import BadVersion, DirectoryStore, Reason
from emaswap.store.line import Term
from emaswap.versions import proof
from tests.forging import FORGERIES, Forgery, Tensors, commit

CPU = torch.device("cpu")


def slightly_other_answers(recorded: Tensors) -> Tensors:
    """Answers that differ by less than another machine's vector units may make them differ."""
    return {name: value + 5e-6 if name.startswith("output/") else value for name, value in recorded.items()}


def prove(store: DirectoryStore, forgery: Forgery) -> None:
    """Commit a version and go through its whole proof."""
    manifest = commit(store, Term(store, "test"), forgery)
    fetched = store.fetch(manifest)
    module = proof.verify(manifest, fetched, trusted=["tests.models.*"], device=CPU)
    proof.replay(manifest, fetched.probe, module, device=CPU)


@pytest.mark.parametrize("tolerances", [(1e-4, 1e-5), (1.0, 1e308), (0.5, 1e-5), (1e-4, 3.0)])
def test_a_manifest_loosens_no_tolerance(store: DirectoryStore, tolerances: tuple[float, float]) -> None:
    """Whatever it says, answers differ as far as the reader allows and no further."""
    prove(store, Forgery(Reason.PROBE_MISMATCH, probe=slightly_other_answers, tolerances=tolerances))
    with pytest.raises(BadVersion, match="probe_mismatch"):
        prove(store, Forgery(Reason.PROBE_MISMATCH, probe=FORGERIES["wrong probe answer"].probe, tolerances=tolerances))


def test_a_manifest_may_tighten_tolerances(store: DirectoryStore) -> None:
    """A publisher that wants equal bits gets them, or no answer."""
    exact = (0.0, 0.0)
    prove(store, Forgery(Reason.PROBE_MISMATCH, tolerances=exact))
    with pytest.raises(BadVersion, match="probe_mismatch"):
        prove(store, Forgery(Reason.PROBE_MISMATCH, probe=slightly_other_answers, tolerances=exact))


def test_a_probe_of_no_rows_proves_nothing(store: DirectoryStore) -> None:
    """A module with any weights would answer it."""
    with pytest.raises(BadVersion, match="a probe of no rows"):
        prove(store, FORGERIES["random weights, and a probe of no rows"])
