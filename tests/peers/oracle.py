"""What an average must be: the formula, in float64, over recorded weights."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from emaswap import DirectoryStore, Manifest
from tests.serving import ROOT

State = dict[str, Tensor]


class Recorder:
    """Records a module's weights at each step of an optimizer, and averages them."""

    def __init__(self, module: nn.Module, decay: Callable[[int], float]) -> None:
        self.module = module
        self.decay = decay
        self.averages = [self._weights()]

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Record at each step that this optimizer really makes."""
        optimizer.register_step_post_hook(lambda *_: self.record())

    def record(self) -> None:
        """One more update of the average."""
        beta = self.decay(len(self.averages))
        weights = self._weights()
        self.averages.append(
            {
                name: beta * average + (1 - beta) * weights[name] if average.is_floating_point() else weights[name]
                for name, average in self.averages[-1].items()
            }
        )

    def _weights(self) -> State:
        return {
            name: tensor.detach().to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in self.module.state_dict().items()
        }


def assert_close(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Both states have the same names, and their values differ by at most the tolerance, relative to the largest."""
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            difference = (state[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
            assert difference <= tolerance * max(1.0, value.abs().max().item() if value.numel() else 0.0), name
        else:
            assert torch.equal(state[name], value), name


def lines_of(heading: str) -> str:
    """The example below a heading of docs/integrations.md."""
    text = (ROOT / "docs" / "integrations.md").read_text()
    return text[text.index(f"## {heading}") :].split("```python\n")[1].split("```")[0]


def published(store: DirectoryStore) -> list[Manifest]:
    """The manifests in a store, the oldest first."""
    return [store.manifest(version) for version in store.versions()]


def weights_of(store: DirectoryStore, manifest: Manifest) -> State:
    """A version's weights as a reader gets them, verified."""
    return store.tensors("weights", manifest.weights).tensors
