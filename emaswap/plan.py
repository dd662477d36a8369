"""The plan of an update: which tensor of each average follows which tensor of the model, worked out once.

Knows tensors, and nothing of schedules or of counting.
"""

import cmath
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from emaswap.errors import EmaError

Buffers = Literal["average", "copy"]

# How many numbers of the model to take at a time into several averages, so that they are read from memory once: 4 MiB
# of float32 stay in the processor's cache, and are enough that starting an operation costs little beside it.
_SLICE = 1 << 20


class Plan:
    """Good as long as `holds`: until a tensor of the model or of an average is exchanged, converted or moved."""

    def __init__(
        self, averages: Sequence[nn.Module], model: nn.Module, *, buffers: Buffers, exclude: Iterable[str]
    ) -> None:
        """Match the tensors by name. Raises `EmaError` naming those that are missing, extra, or of another shape."""
        self._held = [_Held(module) for module in (*averages, model)]
        *averaged, weights = [held.state() for held in self._held]
        for states in averaged:
            if problem := _difference(states, weights):
                raise EmaError(f"the model is not the one that is being averaged: {problem}")

        exclude = tuple(exclude)
        unaveraged = _buffer_names(model) if buffers == "copy" else set()
        self._fused: list[Tensor] = []
        self._fused_averages: list[list[Tensor]] = [[] for _ in averages]
        self._converted: list[tuple[Tensor, list[Tensor]]] = []
        self._copied: list[tuple[Tensor, list[Tensor]]] = []
        self._sharded = False
        done: set[int] = set()
        for name, average in averaged[0].items():
            if id(average) in done:
                continue  # a tied tensor has several names and must decay once
            done.add(id(average))
            self._sharded |= hasattr(average, "_local_tensor")
            weight, followers = _local(weights[name]), [_local(each[name]) for each in averaged]
            is_number = average.is_floating_point() or average.is_complex()
            if not is_number or name in unaveraged or any(fnmatchcase(name, pattern) for pattern in exclude):
                self._copied.append((weight, followers))
            elif any((each.dtype, each.device) != (weight.dtype, weight.device) for each in followers):
                self._converted.append((weight, followers))
            else:
                self._fused.append(weight)
                for column, each in zip(self._fused_averages, followers, strict=True):
                    column.append(each)
        # One average is read and written only once in any case; and on CUDA, starting one kernel for all counts more.
        on_cpu = all(weight.device.type == "cpu" for weight in self._fused)
        cut = len(averages) > 1 and on_cpu
        whole = [(self._fused, self._fused_averages)] if self._fused else []
        self._parts = _slices(self._fused, self._fused_averages) if cut else whole

    def holds(self, averages: Sequence[nn.Module], model: nn.Module) -> bool:
        """Whether all modules still hold the very tensors this plan was made for."""
        return all(held.is_of(module) for held, module in zip(self._held, (*averages, model), strict=True))

    def weights(self) -> list[Tensor]:
        """The model's tensors that are averaged (of sharded ones, this process's part)."""
        return self._fused + [weight for weight, _ in self._converted]

    def pairs(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """Each tensor of the model's state with the one of the average of this index."""
        others = [(weight, followers[index]) for weight, followers in self._converted + self._copied]
        return [*zip(self._fused, self._fused_averages[index], strict=True), *others]

    def found_inf(self) -> Tensor:
        """[1.0] where a weight is not finite, else [0.0]. On CUDA nobody waits for it: it is for `run_unless`."""
        weights = self.weights()
        if all(weight.device.type == "cpu" for weight in weights):
            flag = torch.tensor([float(not all(map(_is_finite, weights)))])
        else:
            norms = [norm.to(weights[0].device) for norm in torch._foreach_norm(weights, float("inf"))]
            flag = (~torch.isfinite(torch.stack(norms)).all()).float().reshape(1)
        if self._sharded:
            # One process's part decides for all, or their averages would no longer belong together.
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return flag

    def run(self, weights: Sequence[float]) -> None:
        """average ← average + weight·(model − average) for each average, and what is not averaged as it is."""
        for model_part, average_parts in self._parts:
            for averages, weight in zip(average_parts, weights, strict=True):
                torch._foreach_lerp_(averages, model_part, weight)
        for now, followers in self._converted:
            for average, weight in zip(followers, weights, strict=True):
                average.lerp_(now.to(average), weight)
        for now, followers in self._copied:
            for average in followers:
                average.copy_(now)

    def run_unless(self, found_inf: Tensor, weights: Sequence[float]) -> None:
        """`run`, or nothing where the flag says so: it is read on the device, and no host waits for it."""
        for index, weight in enumerate(weights):
            pairs = [(now, followers[index]) for now, followers in self._converted]
            averages = self._fused_averages[index]
            if weight < 0.5 and averages and not any(average.is_complex() for average in averages):
                # A step of SGD with weight decay 1 towards the model is this very lerp, and its kernel minds the flag.
                torch._fused_sgd_(
                    averages, self._fused, [], weight_decay=1.0, momentum=0.0, lr=weight, dampening=0.0,
                    nesterov=False, maximize=True, is_first_step=False, grad_scale=None, found_inf=found_inf,
                )  # fmt: skip
            else:
                pairs += zip(self._fused, averages, strict=True)
            for now, average in pairs:
                _set_unless(found_inf, average, average.lerp(now.to(average), weight))
        for now, followers in self._copied:
            for average in followers:
                _set_unless(found_inf, average, now.to(average))


class _Held:
    """The tensors of a module's state where they hang, so that a look tells whether they are still the same.

    The look is made at every update, beside which it must cost nothing: it walks plain dictionaries.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._children: list[tuple[dict[str, nn.Module | None], list[nn.Module | None]]] = []
        self._tensors: list[tuple[dict[str, Tensor | None], int]] = []
        self._entries: list[tuple[dict[str, Tensor | None], str, Tensor, torch.dtype, Callable[[], int], int]] = []
        self._names: list[str] = []
        for prefix, child in module.named_modules(remove_duplicate=False):
            self._children.append((child._modules, list(child._modules.values())))
            # Non-persistent buffers are no state.
            for held, skipped in ((child._parameters, ()), (child._buffers, child._non_persistent_buffers_set)):
                self._tensors.append((held, len(held)))
                for name, tensor in held.items():
                    if tensor is not None and name not in skipped:
                        self._names.append(f"{prefix}.{name}" if prefix else name)
                        # `module.to(...)` and `parameter.data = ...` keep the parameter and change what is in it.
                        address = getattr(tensor, "_local_tensor", tensor).data_ptr
                        self._entries.append((held, name, tensor, tensor.dtype, address, address()))

    def state(self) -> dict[str, Tensor]:
        """The state under its names, without what `torch.compile` puts into them."""
        tensors = (entry[2] for entry in self._entries)
        return {name.replace("_orig_mod.", ""): tensor for name, tensor in zip(self._names, tensors, strict=True)}

    def is_of(self, module: nn.Module) -> bool:
        """Whether this is that module's state, and nothing in it was exchanged, converted or moved."""
        return (
            module is self._module
            and all(list(held.values()) == children for held, children in self._children)
            and all(len(held) == count for held, count in self._tensors)
            and all(
                held.get(name) is tensor and tensor.dtype is dtype and address() == at
                for held, name, tensor, dtype, address, at in self._entries
            )
        )


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor (a `DTensor`, as FSDP2 makes them); any other as it is."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.detach()


def _buffer_names(model: nn.Module) -> set[str]:
    return {name.replace("_orig_mod.", "") for name, _ in model.named_buffers(remove_duplicate=False)}


def _difference(averages: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """What keeps two states from matching, in words; empty when they match."""
    problems = {
        "only in the average": sorted(averages.keys() - weights.keys()),
        "only in the model": sorted(weights.keys() - averages.keys()),
        "of another shape": [
            f"{name} {list(weights[name].shape)}, averaged as {list(average.shape)}"
            for name, average in averages.items()
            if name in weights and weights[name].shape != average.shape
        ],
    }
    return "; ".join(
        f"{what}: {', '.join(names[:5])}{' ...' if names[5:] else ''}" for what, names in problems.items() if names
    )


def _is_finite(tensor: Tensor) -> bool:
    """A sum reads the tensor once and is not finite where a number is not; each is looked at only when it overflows."""
    total = tensor.sum(dtype=torch.float32 if tensor.dtype.itemsize < 4 else None)
    return cmath.isfinite(total.item()) or bool(tensor.isfinite().all())


def _set_unless(flag: Tensor, average: Tensor, value: Tensor) -> None:
    average.copy_(torch.where(flag.to(average.device, non_blocking=True).bool(), average, value))


_Slice = tuple[list[Tensor], list[list[Tensor]]]


def _slices(weights: list[Tensor], averages: list[list[Tensor]]) -> list[_Slice]:
    """The same tensors in groups of about `_SLICE` numbers; larger ones are cut where memory allows it."""
    slices: list[_Slice] = []
    filled = _SLICE
    for weight, *followers in zip(weights, *averages, strict=True):
        for part, *parts in zip(*_cut([weight, *followers]), strict=True):
            if filled + part.numel() > _SLICE:
                slices.append(([], [[] for _ in averages]))
                filled = 0
            filled += part.numel()
            slices[-1][0].append(part)
            for column, each in zip(slices[-1][1], parts, strict=True):
                column.append(each)
    return slices


def _cut(tensors: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """Tensors of one shape in parts of at most `_SLICE` numbers; whole where they do not lie alike in memory."""
    first = tensors[0]
    dense = first.numel() == sum((n - 1) * step for n, step in zip(first.shape, first.stride(), strict=True)) + 1
    if first.numel() <= _SLICE or not dense or any(tensor.stride() != first.stride() for tensor in tensors):
        return [(tensor,) for tensor in tensors]
    return [torch.split(tensor.as_strided((tensor.numel(),), (1,)), _SLICE) for tensor in tensors]
