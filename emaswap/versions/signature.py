"""What goes into a model and what comes out: names, dtypes and shapes of one row, without the batch dimension."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from emaswap.tensors import dtype_name
from emaswap.versions.forward import Binding, describe, named_outputs, pick

DType = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
Size = Annotated[int, Field(ge=0, le=1 << 48)]

MAX_DIMENSIONS = 32
MAX_NUMBERS = 1 << 48


class TensorField(BaseModel):
    """One named input or output. A size of `None` may vary from row to row; a row's batch dimension is not in `shape`."""

    model_config = ConfigDict(frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=200)]
    dtype: DType = "float32"
    shape: Annotated[tuple[Size | None, ...], Field(max_length=MAX_DIMENSIONS)] = ()

    @field_validator("shape")
    @classmethod
    def _can_be_counted(cls, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        if math.prod(size or 1 for size in shape) > MAX_NUMBERS:
            raise ValueError(f"a row has at most {MAX_NUMBERS} numbers, got the shape {shape}")
        return shape

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's own."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def accepts(self, row_shape: Sequence[int]) -> bool:
        """Return whether a row of this shape fits."""
        return len(row_shape) == len(self.shape) and all(
            wanted is None or wanted == size for wanted, size in zip(self.shape, row_shape, strict=True)
        )

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.dtype} of shape ({sizes})"


class Signature(BaseModel):
    """Inputs and outputs of a module, rows first.

    Inputs are bound to `forward` by name; a single input may have a name that `forward` does not know. Outputs are
    picked by name from mappings, dataclasses and named tuples, in turn from plain tuples and lists. `labels` name the
    entries of the one output, which is then a vector of logits.
    """

    model_config = ConfigDict(frozen=True)

    inputs: Annotated[tuple[TensorField, ...], Field(min_length=1)]
    outputs: Annotated[tuple[TensorField, ...], Field(min_length=1)]
    labels: Annotated[tuple[str, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        for kind, fields in (("input", self.inputs), ("output", self.outputs)):
            names = [field.name for field in fields]
            if len(set(names)) != len(names):
                raise ValueError(f"two {kind}s have the same name: {names}")
        for field in self.outputs:
            if 0 in field.shape:
                raise ValueError(f"output {field.name!r} has rows without numbers: {field}")
        if self.labels is not None and (
            len(self.outputs) != 1 or self.outputs[0].shape not in ((len(self.labels),), (None,))
        ):
            raise ValueError(f"{len(self.labels)} labels need one output of shape ({len(self.labels)},)")
        return self

    @classmethod
    def infer(cls, module: nn.Module, inputs: "Inputs", labels: tuple[str, ...] | None = None) -> Self:
        """Return the signature that a batch of example inputs shows, every size fixed.

        The module is run once, in eval mode. Raises `TypeError` or `ValueError` when it cannot take these inputs by
        name, or returns anything but tensors of numbers, a row for each row.
        """
        named = {"input": inputs} if isinstance(inputs, Tensor) else dict(inputs)
        binding = Binding.of(module, list(named), strict=not isinstance(inputs, Tensor))
        modes = {part: part.training for part in module.modules()}
        module.eval()
        try:
            with torch.no_grad():
                returned = _call(module, binding, {name: batch.clone() for name, batch in named.items()})
        finally:
            for part, training in modes.items():
                part.training = training
        outputs = named_outputs(returned)
        if not outputs:
            raise TypeError(f"forward returned {returned!r}, expected a tensor, or several in a tuple or mapping")
        rows = len(next(iter(named.values())))
        return cls(
            inputs=tuple(_field_of("input", name, batch, rows, "") for name, batch in named.items()),
            outputs=tuple(
                _field_of("output", name, batch, rows, f"; returned: {describe(outputs)}")
                for name, batch in outputs.items()
            ),
            labels=labels,
        )

    def name_inputs(self, inputs: "Inputs") -> dict[str, Tensor]:
        """Return a batch by input name, in the signature's order.

        Raises `ValueError` when names, dtypes, shapes or numbers of rows do not fit.
        """
        named = {self.inputs[0].name: inputs} if isinstance(inputs, Tensor) else inputs
        wanted = [field.name for field in self.inputs]
        if set(named) != set(wanted):
            raise ValueError(f"expected inputs {wanted}, got {list(named)}")
        for field in self.inputs:
            batch = named[field.name]
            if dtype_name(batch.dtype) != field.dtype or batch.dim() == 0 or not field.accepts(batch.shape[1:]):
                raise ValueError(
                    f"input {field.name!r}: expected a batch of rows, each {field}, "
                    f"got {dtype_name(batch.dtype)} of shape {tuple(batch.shape)}"
                )
        if len({len(batch) for batch in named.values()}) > 1:
            raise ValueError(
                f"inputs have different numbers of rows: { ({name: len(batch) for name, batch in named.items()}) }"
            )
        return {name: named[name] for name in wanted}

    def check_outputs(self, outputs: Mapping[str, Tensor]) -> None:
        """Raise `ValueError` when outputs, by name, are not dense, or not of the dtypes that the signature says."""
        for field in self.outputs:
            output = outputs[field.name]
            if output.layout != torch.strided:
                raise ValueError(f"output {field.name!r} is {output.layout}, expected a dense tensor")
            if output.dtype != field.torch_dtype:
                came = dtype_name(output.dtype)
                raise ValueError(f"output {field.name!r}: the signature says {field.dtype}, the module returns {came}")

    def bind(self, module: nn.Module, *, strict: bool = False) -> "Bound":
        """Decide once how a module takes the inputs. Raises `TypeError` when that would be a guess: see `Binding.of`."""
        return Bound(module, self, Binding.of(module, [field.name for field in self.inputs], strict=strict))

    def run(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a module (in eval mode) on one batch: see `Bound`. For many batches, `bind` it once."""
        return self.bind(module)(inputs)


@dataclass(frozen=True, eq=False)
class Bound:
    """A module in eval mode that takes a batch by input name and returns its outputs by name."""

    module: nn.Module
    signature: Signature
    binding: Binding

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the module.

        Raises `ValueError` or `TypeError` when it does not return what the signature has: tensors, a row for each row.
        """
        with torch.no_grad():
            returned = _call(self.module, self.binding, inputs)
        fields = self.signature.outputs
        outputs = pick(returned, [field.name for field in fields])
        rows = len(inputs[self.signature.inputs[0].name])
        for field in fields:
            output = outputs[field.name]
            if output.dim() == 0 or output.shape[0] != rows or not field.accepts(output.shape[1:]):
                raise ValueError(
                    f"output {field.name!r}: expected {rows} rows, each {field}, got shape {tuple(output.shape)}"
                )
        return outputs


Inputs = Tensor | Mapping[str, Tensor]


def _call(module: nn.Module, binding: Binding, inputs: Mapping[str, Tensor]) -> object:
    return module(*[inputs[name] for name in binding.positional], **{name: inputs[name] for name in binding.keyword})


def _field_of(kind: str, name: str, batch: object, rows: int, returned: str) -> TensorField:
    """Return the field that a batch shows. Raises when it is no batch of rows that can be sent to anybody."""
    if not isinstance(batch, Tensor):
        raise TypeError(
            f"{kind} {name!r} is a {type(batch).__name__}, expected a tensor{returned}. "
            "Give a Signature that names the outputs to serve, or wrap the module in one that returns these alone"
        )
    if batch.layout != torch.strided:
        raise TypeError(f"{kind} {name!r} is {batch.layout}, which cannot be served: make it dense by .to_dense()")
    dtype = dtype_name(batch.dtype)
    if dtype not in get_args(DType):
        raise TypeError(f"{kind} {name!r} is {dtype}, which cannot be served: convert it to one of {get_args(DType)}")
    if batch.dim() == 0 or len(batch) != rows:
        raise ValueError(
            f"{kind} {name!r} has shape {tuple(batch.shape)}: expected {rows} rows, one for each row of the inputs"
            f"{returned}. Give a Signature without it, or wrap the module in one that returns rows first"
        )
    if 0 in batch.shape[1:]:
        raise ValueError(f"{kind} {name!r} has rows without numbers: its shape is {tuple(batch.shape)}")
    return TensorField.model_validate({"name": name, "dtype": dtype, "shape": tuple(batch.shape[1:])})
