"""Networks that others' frameworks train. They are imported without these frameworks, as a service would."""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from emaswap.models.digits import DigitsNet


def digits(rows: int = 96) -> tuple[Tensor, Tensor]:
    """The first so many of scikit-learn's handwritten digits, as images in [0, 1] and labels."""
    data = load_digits()
    return torch.from_numpy(data.images[:rows] / 16).float().unsqueeze(1), torch.from_numpy(data.target[:rows])


class Classifier(nn.Module):
    """Images, and labels where there are some, to logits, and the loss where there are labels. With dropout."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = DigitsNet(width=width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(self.dropout(images))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def tiny_bert(**config: Any) -> nn.Module:
    """A BERT of Transformers that classifies sequences."""
    from transformers import BertConfig, BertForSequenceClassification

    module: nn.Module = BertForSequenceClassification(BertConfig(**config))
    return module


def yolo_classifier(config: str = "yolo11n-cls.yaml", classes: int = 10) -> nn.Module:
    """A classification network of Ultralytics."""
    from ultralytics.nn.tasks import ClassificationModel

    module: nn.Module = ClassificationModel(config, nc=classes, verbose=False)
    return module
