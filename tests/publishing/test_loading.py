"""Loading what was published: a module that is proven like in a service, or an error that says why not."""

from pathlib import Path

import pytest
import torch

from emaswap import (
    Architecture,
    BadVersion,
    Constant,
    DirectoryStore,
    Missing,
    ModelEMA,
    Publisher,
    Reason,
    StoreError,
    load,
)
from emaswap.models.digits import DigitsNet
from emaswap.store.line import Term
from tests.conftest import Publish
from tests.forging import FORGERIES, ROWS, Forgery, commit
from tests.models import Linear

TRUST = "tests.models.*"


def test_the_newest_version_is_loaded(store: DirectoryStore, publish: Publish) -> None:
    """A path and what to trust are enough; the module is in eval mode and answers like the one that was published."""
    modules = [Linear(), Linear()]
    for module in modules:
        publish(module)
    loaded = load(str(store.root), trusted=TRUST)
    assert torch.equal(loaded(ROWS), modules[1](ROWS))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_version_is_loaded_by_its_number(store: DirectoryStore, publish: Publish) -> None:
    """Older versions are loaded as well, from the same store."""
    modules = [Linear(), Linear()]
    for module in modules:
        publish(module)
    assert torch.equal(load(store, 1, trusted=[TRUST])(ROWS), modules[0](ROWS))


def test_what_emaswap_brings_itself_needs_no_trust(store: DirectoryStore) -> None:
    """The reference networks are trusted, as in a service."""
    net = DigitsNet().eval()
    images = torch.rand(2, 1, 8, 8)
    with Publisher(store, name="digits", architecture=Architecture.of(DigitsNet), probe=images) as publisher:
        publisher.publish(net)
    assert torch.equal(load(store)(images), net(images))


def test_a_variant_is_loaded_by_its_name(store: DirectoryStore) -> None:
    """Each average of a version can be loaded; one that is not there is an error that names those that are."""
    model = Linear()
    ema = ModelEMA(model, decay=Constant(0.0), profiles={"long": Constant(0.9)})
    with torch.no_grad():
        model.layer.weight.add_(1)
    ema.update(model)
    with Publisher(store, name="linear", architecture=Architecture.of(Linear), probe=ROWS) as publisher:
        publisher.publish(ema)
    assert torch.equal(load(store, trusted=TRUST, variant="long")(ROWS), ema.profiles["long"](ROWS))
    assert torch.equal(load(store, trusted=TRUST)(ROWS), ema.ema(ROWS))
    with pytest.raises(BadVersion, match="its variants: long"):
        load(store, trusted=TRUST, variant="short")


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_a_bad_version_is_passed_over_unless_it_is_asked_for(store: DirectoryStore, forgery: Forgery) -> None:
    """Like in a service, the newest good one is taken; a version that is asked for by number is loaded, or an error."""
    term = Term(store, "test")
    good = commit(store, term)
    commit(store, term, forgery)
    loaded = load(store, trusted=TRUST)
    weights = store.tensors("weights", good.weights).tensors
    assert torch.equal(loaded.get_parameter("layer.weight"), weights["layer.weight"])
    with pytest.raises(BadVersion) as caught:
        load(store, 2, trusted=TRUST)
    assert caught.value.reason == forgery.reason


def test_where_all_are_bad_the_newest_says_why(store: DirectoryStore) -> None:
    """The error is that of the version that was wanted most."""
    term = Term(store, "test")
    for name in ("NaN", "wrong shape"):
        commit(store, term, FORGERIES[name])
    with pytest.raises(BadVersion) as caught:
        load(store, trusted=TRUST)
    assert caught.value.reason == Reason.WRONG_SHAPE


def test_what_is_not_trusted_is_not_loaded(store: DirectoryStore, publish: Publish) -> None:
    """The error says what to trust."""
    publish()
    with pytest.raises(BadVersion, match=r"tests.models:Linear is not among the trusted factories"):
        load(store)


def test_a_replaced_publishers_version_is_not_loaded(store: DirectoryStore) -> None:
    """A version behind one of a higher term is passed over like in a service."""
    zombie = Term(store, "test")
    commit(store, zombie)
    successor = Term(store, "test")
    good = commit(store, successor)
    zombie.version = 2
    commit(store, zombie)
    with pytest.raises(BadVersion) as caught:
        load(store, 3, trusted=TRUST)
    assert caught.value.reason == Reason.STALE_TERM
    weights = store.tensors("weights", good.weights).tensors
    assert torch.equal(load(store, trusted=TRUST).get_parameter("layer.weight"), weights["layer.weight"])


def test_nothing_to_load_is_an_error(store: DirectoryStore, tmp_path: Path) -> None:
    """An empty store, one that is not there, and a number that is not in it."""
    with pytest.raises(Missing, match="there is no version in"):
        load(store)
    with pytest.raises(StoreError, match="does not exist"):
        load(tmp_path / "elsewhere")
    with pytest.raises(Missing):
        load(store, 7)
