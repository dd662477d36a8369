"""What goes into a model and what comes out: names, dtypes and shapes of one row, without the batch dimension."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from emaswap.tensors import dtype_name

DType = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
Size = Annotated[int, Field(ge=0)]


class TensorField(BaseModel):
    """One named input or output. A size of `None` may vary from row to row; a row's batch dimension is not in `shape`."""

    model_config = ConfigDict(frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=200)]
    dtype: DType = "float32"
    shape: tuple[Size | None, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's own."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def accepts(self, row_shape: tuple[int, ...]) -> bool:
        """Whether a row of this shape fits."""
        return len(row_shape) == len(self.shape) and all(
            wanted is None or wanted == size for wanted, size in zip(self.shape, row_shape, strict=True)
        )

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.dtype} of shape ({sizes})"


class Signature(BaseModel):
    """Inputs in the order in which `forward` takes them, outputs in the order in which it returns them.

    `labels` name the entries of the one output, which is then a vector of logits.
    """

    model_config = ConfigDict(frozen=True)

    inputs: Annotated[tuple[TensorField, ...], Field(min_length=1)]
    outputs: Annotated[tuple[TensorField, ...], Field(min_length=1)]
    labels: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _names_and_labels_fit(self) -> Self:
        for kind, fields in (("input", self.inputs), ("output", self.outputs)):
            names = [field.name for field in fields]
            if len(set(names)) != len(names):
                raise ValueError(f"two {kind}s have the same name: {names}")
        if self.labels is not None and (
            len(self.outputs) != 1 or self.outputs[0].shape not in ((len(self.labels),), (None,))
        ):
            raise ValueError(f"{len(self.labels)} labels need one output of shape ({len(self.labels)},)")
        return self

    @classmethod
    def infer(cls, module: nn.Module, inputs: "Inputs", labels: tuple[str, ...] | None = None) -> Self:
        """The signature that a batch of example inputs shows, every size fixed. The module is run once, in eval mode."""
        named = {"input": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        modes = {part: part.training for part in module.modules()}
        module.eval()
        try:
            with torch.no_grad():
                outputs = _named_outputs(module(*(batch.clone() for batch in named.values())), None)
        finally:
            for part, training in modes.items():
                part.training = training
        return cls(inputs=_fields_of(named), outputs=_fields_of(outputs), labels=labels)

    def name_inputs(self, inputs: "Inputs") -> dict[str, Tensor]:
        """A batch by input name, in the signature's order. Raises `ValueError` when names, dtypes or shapes do not fit."""
        named = {self.inputs[0].name: inputs} if isinstance(inputs, Tensor) else inputs
        wanted = [field.name for field in self.inputs]
        if set(named) != set(wanted):
            raise ValueError(f"expected inputs {wanted}, got {list(named)}")
        for field in self.inputs:
            batch = named[field.name]
            if dtype_name(batch.dtype) != field.dtype or batch.dim() == 0 or not field.accepts(tuple(batch.shape[1:])):
                raise ValueError(
                    f"input {field.name!r}: expected a batch of rows, each {field}, "
                    f"got {dtype_name(batch.dtype)} of shape {tuple(batch.shape)}"
                )
        return {name: named[name] for name in wanted}

    def run(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a module (in eval mode) on a batch by input name; the outputs by name.

        Raises `ValueError` or `TypeError` when it does not return what the signature has: tensors, a row for each row.
        """
        batch = [inputs[field.name] for field in self.inputs]
        with torch.no_grad():
            outputs = _named_outputs(module(*batch), [field.name for field in self.outputs])
        rows = batch[0].shape[0]
        for field in self.outputs:
            output = outputs[field.name]
            if output.dim() == 0 or output.shape[0] != rows or not field.accepts(tuple(output.shape[1:])):
                raise ValueError(
                    f"output {field.name!r}: expected {rows} rows, each {field}, got shape {tuple(output.shape)}"
                )
        return outputs


Inputs = Tensor | Mapping[str, Tensor]


def _named_outputs(returned: object, names: list[str] | None) -> dict[str, Tensor]:
    """A tensor, a sequence of tensors or a mapping of them, by name; without names, "output", "output_1", ..."""
    if isinstance(returned, Mapping):
        named = {name: returned.get(name) for name in names} if names else dict(returned)
    else:
        values = list(returned) if isinstance(returned, (list, tuple)) else [returned]
        names = names or [f"output_{i}" if i else "output" for i in range(len(values))]
        if len(values) != len(names):
            raise ValueError(f"the module returned {len(values)} outputs, the signature has {len(names)}: {names}")
        named = dict(zip(names, values, strict=True))
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    for name in named.keys() - tensors.keys():
        raise TypeError(f"output {name!r} is a {type(named[name]).__name__}, expected a tensor")
    return tensors


def _fields_of(named: Mapping[str, Tensor]) -> tuple[TensorField, ...]:
    return tuple(
        TensorField.model_validate({"name": name, "dtype": dtype_name(batch.dtype), "shape": tuple(batch.shape[1:])})
        for name, batch in named.items()
    )
