"""What an adapter's configuration and header say, and which of it has been found right before."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

from lorary.registry.adapter_config import AdapterConfig
from lorary.registry.manifest import Manifest
from lorary.registry.safetensors_file import RawHeader, TensorInfo
from lorary.registry.values import ModuleTensors


class ModuleLora(NamedTuple):
    """Rank of one module's A and B, and the factor on their product."""

    rank: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class AdapterSpec:
    """What a validated adapter needs of a server; equal to itself alone.

    Attributes:
        rank: the largest rank of any module.
        modules: module name to ``(rank, scale)``; the scale is 1.0 everywhere in canonical form.
        num_bytes: bytes of tensor data.
        dtype: the widest dtype of any tensor: ``F32``, ``BF16`` or ``F16``.
        config: the checked configuration.
        tensors: where each tensor lies in the file.
        magnitudes: whether every module has DoRA's magnitude vector.
        heads: modules that the adapter brings whole; none where servers serve it.
    """

    rank: int
    modules: Mapping[str, ModuleLora]
    num_bytes: int
    dtype: str
    config: AdapterConfig
    tensors: Mapping[str, TensorInfo]
    magnitudes: bool = False
    heads: tuple[str, ...] = ()


class Layout(NamedTuple):
    """What an adapter's configuration and header say, found right for a base; nobody has read a number.

    Attributes:
        spec: what is returned of an adapter whose numbers are right, too.
        modules: where each module's matrices lie.
        heads: the tensors of modules that it brings whole.
    """

    spec: AdapterSpec
    modules: Mapping[str, ModuleTensors]
    heads: tuple[TensorInfo, ...] = ()


class Layouts:
    """Layouts that were found right, by the bytes that say them: of one base, and up to one rank.

    A recipe's adapters have the same configuration and the same header to the last byte, and to look at
    hundreds of names and shapes takes as long as to read the numbers, in Python. Thread-safe. What
    ``find`` returns for the same bytes is the same object, as long as it is remembered.

    Args:
        most: how many are remembered, those that were used last.
    """

    _MAX_BYTES = 1 << 20
    """What is longer, only few adapters have."""

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[object, ...], Layout] = OrderedDict()

    def find(
        self,
        config: bytes,
        header: RawHeader,
        manifest: Manifest | None,
        examine: Callable[[], Layout | None],
    ) -> Layout:
        """Return what ``examine`` returned for the same bytes before, or else does now.

        Raises:
            LoraryError: what ``examine`` raises; it is not remembered.
        """
        # All that a layout follows from, beside the base and the limits.
        key = (config, header, None if manifest is None else named_invocation(manifest))
        with self._lock:
            found = self._found.get(key)
            if found is not None:
                self._found.move_to_end(key)
                return found
        made = cast("Layout", examine())  # it raises where there would be none
        if len(config) + len(header.json) <= self._MAX_BYTES:
            with self._lock:
                self._found[key] = made
                while len(self._found) > self._most:
                    self._found.popitem(last=False)
        return made


def named_invocation(manifest: Manifest) -> tuple[int, ...] | None:
    """Return the invocation that a registry's manifest names; ``None`` of anybody else's."""
    return manifest.method.invocation_tokens if manifest.digest else None
