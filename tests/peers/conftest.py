"""What the libraries of others need to be imported and trained with here."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from emaswap import DirectoryStore

_KEPT: list[torch.library.Library] = []


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """They import beside a torch for the CPU, use one thread, and neither write outside of the test's folder nor call home."""
    prepare()
    for name in ("HF_HUB_OFFLINE", "DO_NOT_TRACK", "YOLO_OFFLINE", "DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    os.environ.setdefault("YOLO_CONFIG_DIR", str(tmp_path))  # read once, when it is imported
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    """An empty store that nobody has prepared for writing."""
    return DirectoryStore(tmp_path / "store")


def prepare() -> None:
    """A torchvision made for CUDA does not find its operators beside a torch for the CPU, and refuses to be imported."""
    if not importlib.util.find_spec("torchvision"):
        return
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _KEPT.append(library)  # its operators go when it does
        import torchvision  # noqa: F401
