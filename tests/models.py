"""Networks that tests train, publish and serve. The service under test imports them by path and is told to trust them."""

import time

import torch
from torch import Tensor, nn


class Everywhere(nn.Module):
    """Answers each row with all of its weights, so that one answer shows every tensor of the version that made it."""

    def __init__(self, tensors: int = 8, size: int = 4, value: float = 0.0) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.full((size,), float(value))) for _ in range(tensors)])

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat(list(self.weights)).expand(rows.shape[0], -1) + 0 * rows.sum(dim=1, keepdim=True)


class Linear(nn.Module):
    """Rows of `inputs` numbers to rows of `outputs` numbers."""

    def __init__(self, inputs: int = 3, outputs: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.layer(rows)
        return out


class Net(Linear):
    """Rows of `width` numbers to rows of two."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(inputs=width)


class Everything(nn.Module):
    """All that a state can be made of: batch norm, an integer buffer, a tied weight, a non-persistent buffer."""

    steps: Tensor
    scale: Tensor

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.encode = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.decode = nn.Linear(width, width, bias=False)
        self.decode.weight = self.encode.weight
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        out: Tensor = self.decode(self.norm(self.encode(rows)).relu()) * self.scale + self.steps
        return out


class Tokens(nn.Module):
    """Token ids of any number per row, and one number per row, to two named outputs."""

    def __init__(self, vocabulary: int = 10, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width + 1, 3)

    def forward(self, tokens: Tensor, bias: Tensor) -> dict[str, Tensor]:
        mean = self.embedding(tokens).mean(dim=1)
        return {"logits": self.head(torch.cat([mean, bias[:, None]], dim=1)), "mean": mean}


class Slow(nn.Module):
    """Takes its time, in seconds, to hand back its rows."""

    def __init__(self, seconds: float = 1.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, rows: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return rows * self.weight


class EveryDtype(nn.Module):
    """Hands back a row of each dtype that there is, under its name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(
        self,
        float64: Tensor,
        float32: Tensor,
        float16: Tensor,
        bfloat16: Tensor,
        int64: Tensor,
        int32: Tensor,
        int16: Tensor,
        int8: Tensor,
        uint8: Tensor,
        boolean: Tensor,
    ) -> dict[str, Tensor]:
        floats = {"float64": float64, "float32": float32, "float16": float16, "bfloat16": bfloat16}
        whole = {"int64": int64, "int32": int32, "int16": int16, "int8": int8, "uint8": uint8}
        return {f"{name}_out": tensor for name, tensor in (floats | whole | {"boolean": boolean}).items()}


class Same(nn.Module):
    """Hands back its rows, whatever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, rows: Tensor) -> Tensor:
        return rows.clone()


class Large(nn.Module):
    """Many weights and next to no computation."""

    def __init__(self, numbers: int = 8_000_000) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numbers))

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.weight[0]
