"""Networks that benchmarks publish and serve."""

import torch
from torch import Tensor, nn


class Heavy(nn.Module):
    """Many weights and next to no computation: what is timed is how the weights travel."""

    def __init__(self, numbers: int = 25_000_000, tensors: int = 50) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(numbers // tensors)) for _ in range(tensors)])

    def forward(self, rows: Tensor) -> Tensor:
        first: Tensor = self.weights[0]
        return rows + first[0]
