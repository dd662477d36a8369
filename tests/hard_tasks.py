"""Tasks that are hard on a trainer: whose gradients overflow, whose algorithms give other bits each time, and a plain one."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from emaswap import Architecture, Signature, TensorField
from emaswap.models.digits import DigitsNet
from tests.tasks import Noisy
from trainer.tasks import Batch
from trainer.tasks.digits import Digits

OVERFLOWS = (7, 8, 21)


class PlainNet(nn.Module):
    """Neither batch norm nor dropout: the gradient of a batch is just the mean of its rows' gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.layers(rows)
        return logits


class Plain(Noisy):
    """`Noisy` for a plain network."""

    name = "plain"

    def architecture(self) -> Architecture:
        return Architecture.of(PlainNet)

    def build_model(self) -> nn.Module:
        return PlainNet()


class ExactNet(DigitsNet):
    """Computes in double precision: another order of additions makes no difference that could grow to anything."""

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.double())


class ExactDigits(Digits):
    """Digits in double precision."""

    def architecture(self) -> Architecture:
        return Architecture.of(ExactNet)

    def signature(self) -> Signature:
        logits = TensorField(name="logits", dtype="float64", shape=(10,))
        return Signature(inputs=super().signature().inputs, outputs=(logits,))

    def build_model(self) -> nn.Module:
        return ExactNet()


class Overflowing(Plain):
    """A batch of steps `OVERFLOWS` has a row of which nothing finite comes, as far as the loss goes."""

    name = "overflowing"

    def batch(self, step: int, size: int, seed: int) -> Batch:
        factor = torch.inf if step in OVERFLOWS else 1.0
        return *super().batch(step, size, seed), torch.full((size,), factor)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        rows, labels, factors = batch
        return (functional.cross_entropy(model(rows), labels, reduction="none") * factors).mean()


class Undetermined(Plain):
    """Uses what torch has no deterministic algorithm for."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        rows, labels = batch
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return super().loss(model, (rows, labels))
