"""What callbacks are tried with: digits, a decay, a store that is broken for a while, and another publisher."""

from typing import Any

from emaswap import Architecture, Constant, DirectoryStore, Publisher
from emaswap.models.digits import DigitsNet
from tests.peers.nets import digits
from tests.serving import wait_for

IMAGES, LABELS = digits()
DECAY = 0.9


def callback_settings(**options: Any) -> dict[str, Any]:
    """Those that publish the module `net` every four steps, but for these options."""
    settings: dict[str, Any] = {
        "name": "digits",
        "architecture": Architecture.of(DigitsNet, width=4),
        "probe": IMAGES[:2],
        "decay": Constant(DECAY),
        "every_n_steps": 4,
        "module": "net",
    }
    return settings | options


def break_store(store: DirectoryStore, step: int, averaging: Any) -> None:
    """Called before each step with how many were made: from 3 to 6 the store cannot be written, and a publish has failed."""
    weights, away = store.root / "weights", store.root / "away"
    if step == 3:
        weights.rename(away)
        weights.write_text("not a folder")
    if step == 6:
        wait_until_failed(averaging)
        weights.unlink()
        away.rename(weights)


def take_over(store: DirectoryStore, step: int, averaging: Any) -> None:
    """Called before each step with how many were made: after 2 another publisher has the store, and by 6 ours has seen it."""
    if step == 2:
        architecture = Architecture.of(DigitsNet, width=4)
        with Publisher(store, name="digits", architecture=architecture, probe=IMAGES[:2]) as publisher:
            publisher.publish(DigitsNet(width=4))
    if step == 6:
        wait_until_failed(averaging)


def wait_until_failed(averaging: Any) -> None:
    """Return once a callback's publisher has failed to publish."""
    wait_for(lambda: averaging.publisher.error)
