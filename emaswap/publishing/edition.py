"""An edition: what a private copy has become once it is calibrated, rounded, proven and described, but not yet stored."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor, nn

from emaswap.errors import BadVersion, PublishError
from emaswap.publishing.rehearsal import Rehearsal
from emaswap.publishing.snapshot import MAIN, Layout, PrivateCopy
from emaswap.store.line import Place
from emaswap.tensors import dtype_name, named_tensors, not_finite, plain_name
from emaswap.versions.architecture import Architecture, fill
from emaswap.versions.manifest import EmaInfo, Manifest, TensorInfo, TrainingInfo, Variant
from emaswap.versions.probe import Probe, tolerances
from emaswap.versions.signature import Signature


@dataclass(frozen=True)
class Part:
    """One of an edition's averages: the tensors to store, and its proof."""

    tensors: dict[str, Tensor]
    probe: Probe
    rtol: float
    atol: float
    ema: EmaInfo

    @property
    def table(self) -> dict[str, TensorInfo]:
        """What a manifest says of the tensors."""
        return {
            name: TensorInfo(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
            for name, tensor in self.tensors.items()
        }


@dataclass(frozen=True)
class Edition:
    """A version before it has files and a place in the line. It holds the private copy's memory, and no copy of it."""

    parts: dict[str, Part]
    architecture: Architecture
    signature: Signature
    training: TrainingInfo

    def describe(self, name: str, place: Place, stored: Mapping[str, Variant]) -> Manifest:
        """Return the manifest of the version of a model of this name, with its parts as they were stored."""
        return Manifest(
            model=name,
            **asdict(place),
            created_at=datetime.now(UTC),
            architecture=self.architecture,
            signature=self.signature,
            training=self.training,
            **dict(stored[MAIN]),
            variants={variant: part for variant, part in stored.items() if variant != MAIN},
        )


class Editor:
    """Makes editions of the private copies of one module."""

    def __init__(
        self,
        architecture: Architecture,
        rehearsal: Rehearsal,
        *,
        dtype: torch.dtype | None,
        calibrate: Callable[[nn.Module], object] | None,
    ) -> None:
        """See `Publisher` for the arguments."""
        self._architecture = architecture
        self._signature, self._inputs = rehearsal.signature, rehearsal.inputs
        self._dtype = dtype
        self._calibrate = calibrate
        # What a service builds. It is needed once, to compare with what is published.
        self._built: nn.Module | None = rehearsal.module
        self._layout: Layout | None = None

    @torch.no_grad()
    def edit(self, copied: PrivateCopy) -> Edition:
        """Prove each module of a private copy right. Raises `EmaswapError` when it could not be served."""
        copied.wait()
        parts = {
            name: self._part(module, copied.layouts[name], copied.infos[name])
            for name, module in copied.modules.items()
        }
        return Edition(parts, self._architecture, self._signature, copied.training)

    def _part(self, module: nn.Module, layout: Layout, ema: EmaInfo) -> Part:
        if self._calibrate is not None:
            self._calibrate(module)
        tensors = named_tensors(module)
        stored = tensors | self._rounded(module, tensors)
        if bad := not_finite(tensors):
            raise PublishError(
                f"weights that are not finite would be rejected: {', '.join(bad[:5])} (for a mask of infinities, "
                "register_buffer(..., persistent=False))"
            )
        rtol, atol = tolerances(tensors, torch.device("cpu"))
        if self._built is None:
            if layout != self._layout:
                raise PublishError("it is not a module like the ones published before: make a publisher of its own")
            probe = Probe.record(module, self._signature, self._inputs)
        else:
            probe = self._first_proof(self._built, module, tensors, rtol=rtol, atol=atol)
            self._built, self._layout = None, layout
        return Part(stored, probe, rtol, atol, ema)

    def _rounded(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Round parameters in place, so that they are proven as they are stored, and return those in fewer bytes."""
        if self._dtype is None:
            return {}
        parameters = {plain_name(name) for name, _ in module.named_parameters()}
        rounded = {
            name: tensor.to(self._dtype)
            for name, tensor in tensors.items()
            if name in parameters and tensor.is_floating_point() and tensor.dtype.itemsize > self._dtype.itemsize
        }
        for name, tensor in rounded.items():
            tensors[name].copy_(tensor)
        return rounded

    def _first_proof(
        self, built: nn.Module, module: nn.Module, tensors: Mapping[str, Tensor], *, rtol: float, atol: float
    ) -> Probe:
        """Do once what every service will do: a wrong factory is found here and not in front of users."""
        try:
            fill(built, tensors)
            probe = Probe.record(module, self._signature, self._inputs)
            probe.compare(probe.replay(built, self._signature), rtol=rtol, atol=atol)
        except (BadVersion, ValueError, TypeError) as error:
            raise PublishError(
                f"{self._architecture.factory} does not build the module that is published: {error}"
            ) from error
        return probe
