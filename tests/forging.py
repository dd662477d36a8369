"""Forged versions: committed by the book, wrong in one respect."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from emaswap import Architecture, DirectoryStore, Manifest, Reason, Signature
from emaswap.files.digest import digest_of, stem_of
from emaswap.files.tensor_file import Blob
from emaswap.store.keys import tensors_key
from emaswap.store.line import Place, Term
from emaswap.tensors import dtype_name, named_tensors
from emaswap.versions.manifest import ProbeInfo, TensorInfo, WeightsInfo
from emaswap.versions.probe import Probe
from tests.models import Linear

Tensors = dict[str, Tensor]
ROWS = torch.linspace(-1, 1, 12).view(4, 3)


def _same(tensors: Tensors) -> Tensors:
    return tensors


def _untouched(path: Path) -> None:
    pass


@dataclass(frozen=True)
class Forgery:
    """What is wrong with a version, and the reason for which it must be rejected."""

    reason: Reason
    weights: Callable[[Tensors], Tensors] = _same
    probe: Callable[[Tensors], Tensors] = _same
    file: Callable[[Path], None] = _untouched
    factory: str = ""
    raw_weights: bytes | None = None
    tolerances: tuple[float, float] = (1e-4, 1e-5)
    manifest: Callable[[bytes], bytes] | None = None


def commit(store: DirectoryStore, term: Term, forgery: Forgery | None = None) -> Manifest:
    """Commit a `Linear` as the next version, whole or forged; what its manifest said before that was forged, too."""
    forgery = forgery or Forgery(Reason.MANIFEST_INVALID)
    module = Linear().eval()
    tensors = forgery.weights(named_tensors(module))
    signature = Signature.infer(module, ROWS)
    recorded = forgery.probe(Probe.record(module, signature, ROWS).to_tensors())
    weights = (
        _put(store, forgery.raw_weights) if forgery.raw_weights else store.add_tensors("weights", tensors, "blake3")
    )
    probe = store.add_tensors("probes", recorded, "blake3")
    architecture = Architecture(factory=forgery.factory) if forgery.factory else Architecture.of(Linear)
    forgery.file(store.root / tensors_key("weights", weights.digest))

    def describe(place: Place) -> Manifest:
        raw = forgery.manifest(str(place.version).encode()) if forgery.manifest else None
        return _Forged(
            model="test",
            version=place.version,
            term=place.term,
            run=place.run,
            parent=place.parent,
            created_at=datetime.now(UTC),
            weights=WeightsInfo(digest=weights.digest, size=weights.size, tensors=_table(tensors)),
            architecture=architecture,
            signature=signature,
            probe=ProbeInfo(
                digest=probe.digest, size=probe.size, rtol=forgery.tolerances[0], atol=forgery.tolerances[1]
            ),
            raw=raw,
        )

    return term.commit(describe)


class _Forged(Manifest):
    """A manifest that may be stored as other bytes than its own."""

    raw: bytes | None = Field(None, exclude=True)

    def encode(self) -> bytes:
        return super().encode() if self.raw is None else self.raw


def _table(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(dtype=dtype_name(t.dtype), shape=tuple(t.shape)) for name, t in tensors.items()}


def _put(store: DirectoryStore, data: bytes) -> Blob:
    digest = digest_of(data)
    (store.root / "weights" / f"{stem_of(digest)}.safetensors").write_bytes(data)
    return Blob(digest=digest, size=len(data))


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"!")


def _replace_by_link(path: Path) -> None:
    elsewhere = path.with_suffix(".elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def _with_nan(tensors: Tensors) -> Tensors:
    bias = tensors["layer.bias"].clone()
    bias[0] = float("nan")
    return tensors | {"layer.bias": bias}


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def _other_answers(recorded: Tensors) -> Tensors:
    return {name: value + 0.01 if name.startswith("output/") else value for name, value in recorded.items()}


FORGERIES = {
    "flipped bit": Forgery(Reason.DIGEST_MISMATCH, file=_flip_a_bit),
    "truncated file": Forgery(Reason.SIZE_MISMATCH, file=lambda path: os.truncate(path, path.stat().st_size - 5)),
    "longer file": Forgery(Reason.SIZE_MISMATCH, file=_append),
    "file gone": Forgery(Reason.FILE_MISSING, file=Path.unlink),
    "link instead of a file": Forgery(Reason.NOT_A_FILE, file=_replace_by_link),
    "giant header": Forgery(Reason.HEADER_TOO_LARGE, raw_weights=(1 << 60).to_bytes(8, "little") + b"{}"),
    "rubbish for a header": Forgery(Reason.HEADER_INVALID, raw_weights=(8).to_bytes(8, "little") + b"not JSON"),
    "wrong shape": Forgery(Reason.WRONG_SHAPE, weights=lambda tensors: tensors | {"layer.bias": torch.zeros(3)}),
    "wrong dtype": Forgery(
        Reason.WRONG_DTYPE, weights=lambda tensors: tensors | {"layer.bias": torch.zeros(2, dtype=torch.float64)}
    ),
    "missing tensor": Forgery(Reason.MISSING_TENSOR, weights=_without("layer.bias")),
    "unexpected tensor": Forgery(
        Reason.UNEXPECTED_TENSOR, weights=lambda tensors: tensors | {"layer.scale": torch.ones(2)}
    ),
    "NaN": Forgery(Reason.NOT_FINITE, weights=_with_nan),
    "wrong probe answer": Forgery(Reason.PROBE_MISMATCH, probe=_other_answers),
    "wrong probe answer, and tolerances to let it pass": Forgery(
        Reason.PROBE_MISMATCH, probe=_other_answers, tolerances=(1.0, 1e308)
    ),
    "random weights, and a probe of no rows": Forgery(
        Reason.PROBE_FAILED, probe=lambda recorded: {name: value[:0] for name, value in recorded.items()}
    ),
    "probe without inputs": Forgery(Reason.PROBE_FAILED, probe=_without("input/input")),
    "untrusted factory": Forgery(Reason.UNTRUSTED_FACTORY, factory="os:system"),
    "factory that is not there": Forgery(Reason.FACTORY_FAILED, factory="tests.models:Absent"),
    "manifest not JSON": Forgery(Reason.MANIFEST_INVALID, manifest=lambda version: b"version " + version),
    "manifest without fields": Forgery(Reason.MANIFEST_INVALID, manifest=lambda version: b'{"version": %b}' % version),
    "manifest of a later format": Forgery(
        Reason.FORMAT_UNKNOWN, manifest=lambda _: b'{"format": 2, "release": "9.0.0"}'
    ),
}
