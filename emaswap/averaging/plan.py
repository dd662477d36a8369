"""The plan of an update: which tensor of each average follows which tensor of the model, worked out once.

Knows tensors, and nothing of schedules or of counting.
"""

import cmath
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emaswap.averaging.held import Held, local_part
from emaswap.errors import EmaError
from emaswap.tensors import differences, in_words, plain_name

Buffers = Literal["average", "copy"]

# How many numbers of the model to take at a time into several averages, so that they are read from memory once: 4 MiB
# of float32 stay in the processor's cache, and are enough that starting an operation costs little beside it.
_SLICE = 1 << 20
# What torch cannot add up in its own dtype, besides what has less than four bytes.
_WIDE = {torch.complex32: torch.complex64}


class Plan:
    """What an update reads and writes. It is good as long as `holds` says so."""

    def __init__(
        self, averages: Sequence[nn.Module], model: nn.Module, *, buffers: Buffers, exclude: Iterable[str]
    ) -> None:
        """Match the tensors by name. Raises `EmaError` naming those that are missing, extra, or of another shape."""
        self._held = [Held(module) for module in (*averages, model)]
        *averaged, weights = [held.state() for held in self._held]
        for states in averaged:
            _check_alike(states, weights)
        _check_apart(averaged[0])
        exclude = tuple(exclude)
        unaveraged = _buffer_names(model) if buffers == "copy" else set()
        copied = {
            _memory(average)
            for name, average in averaged[0].items()
            if name in unaveraged or any(fnmatchcase(name, pattern) for pattern in exclude)
        }
        self._fused: list[Tensor] = []
        self._fused_averages: list[list[Tensor]] = [[] for _ in averages]
        self._converted: list[tuple[Tensor, list[Tensor]]] = []
        self._masked: list[tuple[Tensor, list[Tensor]]] = []
        self._copied: list[tuple[Tensor, list[Tensor]]] = []
        self._names: dict[int, str] = {}
        self._meshes: dict[Any, None] = {}
        done: dict[object, object] = {}
        for name, average in averaged[0].items():
            memory = _memory(average)
            if memory in done:  # a tied tensor has several names and must decay once
                if done[memory] != _memory(weights[name]):
                    raise EmaError(f"the model does not match its average: tied only in the average: {name}")
                continue
            done[memory] = _memory(weights[name])
            if mesh := getattr(average, "device_mesh", None):
                self._meshes[mesh] = None
            weight, followers = local_part(weights[name]), [local_part(each[name]) for each in averaged]
            self._names[id(weight)] = name
            is_number = average.is_floating_point() or average.is_complex()
            if not is_number or memory in copied:
                self._copied.append((weight, followers))
            elif not all(each.is_meta or _is_finite(each) for each in followers):
                self._masked.append((weight, followers))
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
        self._groups, self._odd = _groups(self._fused, self._fused_averages)

    def holds(self, averages: Sequence[nn.Module], model: nn.Module) -> bool:
        """Return whether all modules still hold the very tensors that this plan was made for."""
        return all(held.is_of(module) for held, module in zip(self._held, (*averages, model), strict=True))

    def weights(self) -> list[Tensor]:
        """Return the tensors of the model that are averaged (of sharded ones, this process's part)."""
        return self._fused + [weight for weight, _ in self._converted + self._masked]

    def pairs(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor of the model's state with its counterpart in the average of this index."""
        others = [(weight, followers[index]) for weight, followers in self._converted + self._masked + self._copied]
        return [*zip(self._fused, self._fused_averages[index], strict=True), *others]

    def put_back(self) -> None:
        """Give the model back the very tensors, in the memory, that it had when this plan was made."""
        self._held[-1].put_back()

    def found_inf(self) -> Tensor:
        """Return [1.0] where a weight is not finite and was not so in the average, else [0.0].

        On CUDA the flag stays on the device; pass it to `run_unless`.
        """
        everything = self.weights()
        if all(weight.device.type == "cpu" for weight in everything):
            # The last come first: what was looked at most recently is averaged first, while it is still in the cache.
            found = not all(map(_is_finite, reversed(self._looked_at()))) or any(
                bool(_has_become_infinite(now, followers[0])) for now, followers in self._masked
            )
            flag = torch.tensor([float(found)])
        else:
            device = everything[0].device
            filled = [weight for weight in self._looked_at() if weight.numel()]  # an empty one has no norm
            norms = [norm.to(device) for norm in torch._foreach_norm(filled, float("inf"))] if filled else []
            flag = (~torch.isfinite(torch.stack([torch.zeros((), device=device), *norms])).all()).float().reshape(1)
            for now, followers in self._masked:
                flag = torch.maximum(flag, _has_become_infinite(now, followers[0]).to(flag).reshape(1))
        # One process's part decides for all that share a tensor, or their averages would no longer belong together. Of
        # meshes within one another the largest comes last, so that all learn what was found in a part.
        for mesh in sorted(self._meshes, key=lambda mesh: mesh.size()):
            for dimension in range(mesh.ndim):
                torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, mesh.get_group(dimension))
        return flag

    def _looked_at(self) -> list[Tensor]:
        """Return the weights in which nothing may be infinite, as the averages get them."""
        return self._fused + [_narrowed(weight, followers[0]) for weight, followers in self._converted]

    def not_finite(self) -> list[str]:
        """Return the names of the weights for which `found_inf` says that they are not finite. Waits for the device."""
        found = [weight for weight in self._fused if not _is_finite(weight)]
        found += [now for now, followers in self._converted if not _is_finite(_narrowed(now, followers[0]))]
        found += [now for now, followers in self._masked if _has_become_infinite(now, followers[0])]
        return [self._names[id(weight)] for weight in found]

    def run(self, weights: Sequence[float]) -> None:
        """Make average ← average + weight·(model − average) for each average, and copy what is not averaged."""
        for model_part, average_parts in self._parts:
            for averages, weight in zip(average_parts, weights, strict=True):
                if weight == 1:  # an exact copy: from NaN, or over too far a way, a lerp does not arrive
                    torch._foreach_copy_(averages, model_part)
                else:
                    torch._foreach_lerp_(averages, model_part, weight)
        for now, followers in self._converted:
            for average, weight in zip(followers, weights, strict=True):
                average.copy_(now) if weight == 1 else average.lerp_(now.to(average), weight)
        for now, followers in self._masked:
            for average, weight in zip(followers, weights, strict=True):
                value = now.to(average)
                if not torch.equal(average, value):  # a mask that never changes costs one look
                    average.copy_(_averaged_where_finite(average, value, weight))
        for followed in zip(*(followers for _, followers in self._copied), strict=True):
            torch._foreach_copy_(followed, [now for now, _ in self._copied])

    def run_unless(self, found_inf: Tensor, weights: Sequence[float]) -> None:
        """Do what `run` does, or nothing if the flag says so. The flag is read on the device; the host does not wait."""
        for index, weight in enumerate(weights):
            pairs = [(now, followers[index]) for now, followers in self._converted + self._odd]
            for group, columns in self._groups:
                averages = columns[index]
                if weight < 0.5:
                    # A step of SGD with weight decay 1 towards the model is this very lerp, and its kernel minds the flag.
                    torch._fused_sgd_(
                        averages, group, [], weight_decay=1.0, momentum=0.0, lr=weight, dampening=0.0, nesterov=False,
                        maximize=True, is_first_step=False, grad_scale=None, found_inf=found_inf.to(group[0].device),
                    )  # fmt: skip
                else:
                    pairs += zip(group, averages, strict=True)
            for now, average in pairs:
                value = now.to(average)
                _set_unless(found_inf, average, value if weight == 1 else average.lerp(value, weight))
            for now, followers in self._masked:
                average = followers[index]
                _set_unless(found_inf, average, _averaged_where_finite(average, now.to(average), weight))
        for now, followers in self._copied:
            for average in followers:
                _set_unless(found_inf, average, now.to(average))


def _memory(tensor: Tensor) -> object:
    """Return equal values for tensors that share memory, whichever object holds them."""
    local = getattr(tensor, "_local_tensor", tensor)
    return (local.data_ptr(), local.dtype, local.shape, local.stride()) if local.data_ptr() else id(tensor)


def _check_apart(averages: Mapping[str, Tensor]) -> None:
    """Raise `EmaError` where two tensors share a part of their memory, which would decay twice.

    Tied ones share all of it, number by number. Tensors with gaps between their numbers, as columns of one matrix, may
    lie within one another and share nothing.
    """
    apart = {_memory(each): (name, local_part(each)) for name, each in averages.items()}
    tensors = sorted((each.data_ptr(), name, each) for name, each in apart.values() if each.numel() and each.data_ptr())
    together: list[tuple[int, str, Tensor]] = []
    end = 0
    for start, name, tensor in tensors:
        if start >= end:
            together = []
        for before, other, another in together:
            if start < before + _extent(another) and _overlap(another, tensor, start - before):
                raise EmaError(
                    f"{other} and {name} share a part of their memory, which would decay twice: register clones"
                )
        together.append((start, name, tensor))
        end = max(end, start + _extent(tensor))


def _extent(tensor: Tensor) -> int:
    """Return how many bytes lie between a tensor's first number and the end of its last."""
    return (sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.itemsize


def _overlap(first: Tensor, second: Tensor, distance: int) -> bool:
    """Return whether two tensors, of which the second begins so many bytes after the first, share any byte."""
    touched = torch.zeros(max(_extent(first), distance + _extent(second)), dtype=torch.bool)
    views = [
        touched.as_strided((*each.shape, each.itemsize), (*(step * each.itemsize for step in each.stride()), 1), offset)
        for each, offset in ((first, 0), (second, distance))
    ]
    views[0].fill_(True)
    return bool(views[1].any())


def _check_alike(averages: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    if found := differences(averages, weights, dtypes=_fits) or _sharded_differently(averages, weights):
        raise EmaError(
            f"the model does not match its average: {in_words(found)}; make a ModelEMA of the model as it is now"
        )
    if lost := [name for name, each in weights.items() if each.is_meta and not averages[name].is_meta]:
        raise EmaError(f"{lost[0]} is on the meta device, without memory; materialize the model first")


def _fits(average: torch.dtype, weight: torch.dtype) -> bool:
    """Return whether numbers of one dtype can follow another's: those with a point may be wider or narrower."""
    return average == weight or (
        (average.is_floating_point or average.is_complex)
        and (average.is_floating_point, average.is_complex) == (weight.is_floating_point, weight.is_complex)
    )


def _sharded_differently(averages: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the tensors of which this process has another part in the average than in the model."""
    parts = [{name: local_part(each) for name, each in state.items()} for state in (averages, weights)]
    found = [name for names in differences(*parts, dtypes=None).values() for name in names]
    return {"sharded_differently": found} if found else {}


def _buffer_names(model: nn.Module) -> set[str]:
    return {plain_name(name) for name, _ in model.named_buffers(remove_duplicate=False)}


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite: by a sum, which reads the tensor once, and one by one only if that overflows."""
    total = tensor.sum(dtype=_WIDE.get(tensor.dtype) or (torch.float32 if tensor.dtype.itemsize < 4 else None))
    if cmath.isfinite(total.item()):
        return True
    return bool((tensor if tensor.dtype.itemsize > 1 else tensor.float()).isfinite().all())


def _narrowed(weight: Tensor, average: Tensor) -> Tensor:
    """Return a weight in the average's dtype where that may overflow, and as it is elsewhere."""
    narrower = torch.finfo(average.dtype).max < torch.finfo(weight.dtype).max
    return weight.to(average.dtype) if narrower else weight


def _has_become_infinite(weight: Tensor, average: Tensor) -> Tensor:
    """Return whether a number of the weight is not finite and is another one than in the average, as a tensor."""
    value = weight.to(average)
    if value.device.type == "cpu" and torch.equal(value, average):
        return torch.tensor(data=False)
    same = (value == average) | (value.isnan() & average.isnan())
    return (~value.isfinite() & ~same).any()


def _averaged_where_finite(average: Tensor, value: Tensor, weight: float) -> Tensor:
    """Return the average of what is finite on both sides, and the value elsewhere: a lerp would make NaN of infinities."""
    finite = average.isfinite() & value.isfinite()
    return value if weight == 1 else torch.where(finite, average.lerp(value, weight), value)


def _set_unless(flag: Tensor, average: Tensor, value: Tensor) -> None:
    # Not to the CPU without waiting: it would be read there before it has arrived.
    average.copy_(torch.where(flag.to(average.device).reshape(()).bool(), average, value))


_Slice = tuple[list[Tensor], list[list[Tensor]]]


def _slices(weights: list[Tensor], averages: list[list[Tensor]]) -> list[_Slice]:
    """Return the tensors in groups of about `_SLICE` numbers; larger ones are cut where their layout allows it."""
    slices: list[_Slice] = []
    filled = 0
    for weight, *followers in zip(weights, *averages, strict=True):
        for part, *parts in zip(*_cut([weight, *followers]), strict=True):
            if not slices or filled + part.numel() > _SLICE:
                slices.append(([], [[] for _ in averages]))
                filled = 0
            filled += part.numel()
            slices[-1][0].append(part)
            for column, each in zip(slices[-1][1], parts, strict=True):
                column.append(each)
    return slices


def _groups(
    weights: list[Tensor], averages: list[list[Tensor]]
) -> tuple[list[_Slice], list[tuple[Tensor, list[Tensor]]]]:
    """Return groups that one kernel takes together (real, dense, of one device, dtype and layout), and all others."""
    groups: dict[tuple[torch.device, torch.dtype], _Slice] = {}
    others: list[tuple[Tensor, list[Tensor]]] = []
    for weight, *followers in zip(weights, *averages, strict=True):
        if weight.is_complex() or not _alike([weight, *followers]):
            others.append((weight, followers))
            continue
        group = groups.setdefault((weight.device, weight.dtype), ([], [[] for _ in averages]))
        group[0].append(weight)
        for column, each in zip(group[1], followers, strict=True):
            column.append(each)
    return list(groups.values()), others


def _cut(tensors: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """Tensors of one shape in parts of at most `_SLICE` numbers; whole where they do not lie alike in memory."""
    if tensors[0].numel() <= _SLICE or not _alike(tensors):
        return [(tensor,) for tensor in tensors]
    return [torch.split(tensor.as_strided((tensor.numel(),), (1,)), _SLICE) for tensor in tensors]


def _alike(tensors: list[Tensor]) -> bool:
    """Return whether tensors of one shape have their numbers in the same order in memory, without gaps."""
    first = tensors[0]
    dense = first.numel() == sum((n - 1) * step for n, step in zip(first.shape, first.stride(), strict=True)) + 1
    return dense and all(tensor.stride() == first.stride() for tensor in tensors)
