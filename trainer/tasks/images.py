"""The base of tasks that classify images."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from emaswap import Signature, TensorField
from trainer.tasks import Batch, seeded


class LabelledImages:
    """Images, (N, 1, H, W) with pixels in [0, 1], and their classes, (N,), split into training and test images.

    A subclass adds `name`, `architecture`, `build_model` and `augment`.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, test_rows: int, split_seed: int) -> None:
        """Shuffle with `split_seed`, and hold out the first `test_rows` for testing."""
        order = torch.randperm(len(labels), generator=seeded(split_seed))
        images, labels = images[order], labels[order]
        self.test_images, self.test_labels = images[:test_rows], labels[:test_rows]
        self.train_images, self.train_labels = images[test_rows:], labels[test_rows:]

    def augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return varied images of the same classes; draw random numbers only from the generator."""
        raise NotImplementedError

    def signature(self) -> Signature:
        classes = int(self.train_labels.max()) + 1
        return Signature(
            inputs=(TensorField(name="image", shape=tuple(self.train_images.shape[1:])),),
            outputs=(TensorField(name="logits", shape=(classes,)),),
            labels=tuple(map(str, range(classes))),
        )

    def batch(self, step: int, size: int, seed: int) -> Batch:
        rows = len(self.train_labels)
        size = min(size, rows)
        epoch, index = divmod(step, rows // size)
        chosen = torch.randperm(rows, generator=seeded(seed, epoch))[index * size : (index + 1) * size]
        return self.augment(self.train_images[chosen], seeded(seed, epoch, index)), self.train_labels[chosen]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(model(images), labels, label_smoothing=0.05)

    def evaluate(self, model: nn.Module, device: torch.device) -> Mapping[str, float]:
        labels = self.test_labels.to(device)
        logits = model(self.test_images.to(device)).float()
        return {
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
            "loss": functional.cross_entropy(logits, labels).item(),
        }

    def probe(self) -> Tensor:
        return self.test_images[:8].clone()


def shifted(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Return each image shifted by up to `pixels` vertically and horizontally, filled with zeros at the edges."""
    rows, _, height, width = images.shape
    padded = functional.pad(images, (pixels,) * 4)
    down, right = torch.randint(0, 2 * pixels + 1, (2, rows, 1, 1), generator=generator)
    y = down + torch.arange(height).view(1, -1, 1)
    x = right + torch.arange(width).view(1, 1, -1)
    return padded[torch.arange(rows).view(-1, 1, 1), 0, y, x].unsqueeze(1)
