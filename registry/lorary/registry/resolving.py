"""What a ref means just now: a name and an alias, a number or a digest become a version."""

from __future__ import annotations

from lorary.errors import AdapterNotFound, InvalidRef
from lorary.registry.backend import Store
from lorary.registry.marks import Marks
from lorary.registry.refs import LATEST, AdapterRef, check_name, parse_ref
from lorary.registry.results import Resolved
from lorary.registry.versions import Pointer


class Resolver:
    """Answers what refs mean, from what a store knows at the moment of the call."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def resolve(self, ref: str | AdapterRef) -> Resolved:
        """Return what a ref means just now; one or two ``stat`` calls once an adapter is known.

        Raises:
            InvalidRef: the text is not a ref, or a digest prefix fits several versions.
            AdapterNotFound: no such adapter, alias, version or digest.
        """
        if isinstance(ref, str):
            ref = parse_ref(ref)
        marks = self._store.marks(ref.name)
        if ref.digest is not None:
            self.known(ref.name)
            return self._by_digest(ref.name, ref.digest, marks)
        if ref.alias is None or ref.alias == LATEST:
            newest = self.known(ref.name)
            version = ref.version or _latest(ref.name, newest, marks)
        else:
            # The commonest: the log's status alone tells that nothing has changed, or is gone.
            version = self._store.alias_state(ref.name).get(ref.alias, 0)
            if not version:
                raise AdapterNotFound(
                    f"adapter '{ref.name}' has no alias '{ref.alias}'; it has "
                    f"{', '.join(sorted(self.aliases(ref.name)))}"
                )
        pointer = self._store.pointer(ref.name, version)
        if pointer is None:
            raise AdapterNotFound(
                f"adapter '{ref.name}' has no version {version}; it has 1 to {self.known(ref.name)}"
            )
        marks.check_there(ref.name, pointer.version)
        return Resolved(
            name=ref.name,
            version=pointer.version,
            digest=pointer.digest,
            alias=ref.alias,
            deprecated=marks.why_deprecated(pointer.version),
        )

    def aliases(self, name: str) -> dict[str, int]:
        """Return where every alias points, ``latest`` included.

        Raises:
            AdapterNotFound: no such adapter.
        """
        newest = self.known(name)
        marks = self._store.marks(name)
        latest = {} if len(marks.deleted) == newest else {LATEST: _latest(name, newest, marks)}
        return {**latest, **self._store.alias_state(name)}

    def known(self, name: str) -> int:
        """Return the number of an adapter's newest version.

        Raises:
            InvalidRef: the name is not valid.
            AdapterNotFound: no such adapter.
        """
        newest = self._store.newest(check_name(name))
        if not newest:
            raise AdapterNotFound(f"adapter '{name}' is not in the registry")
        return newest

    def pointer(self, resolved: Resolved) -> Pointer:
        """Return what a version's number stands for.

        Raises:
            AdapterNotFound: the version is gone, or is another by now.
        """
        self.known(resolved.name)
        pointer = self._store.pointer(resolved.name, resolved.version)
        if pointer is None or pointer.digest != resolved.digest:
            raise AdapterNotFound(
                f"version {resolved.version} of adapter '{resolved.name}' is no longer "
                f"{resolved.digest[:19]}…; resolve the ref again"
            )
        return pointer

    def _by_digest(self, name: str, digest: str, marks: Marks) -> Resolved:
        fits = [p for p in self._store.pointers(name) if p.digest.startswith(digest)]
        found = [p for p in fits if p.version not in marks.deleted]
        if fits and not found:
            marks.check_there(name, fits[-1].version)
        if not found:
            raise AdapterNotFound(f"adapter '{name}' has no version with digest {digest}…")
        if len({pointer.digest for pointer in found}) > 1:
            numbers = ", ".join(str(pointer.version) for pointer in found)
            raise InvalidRef(
                f"digest {digest}… fits versions {numbers} of '{name}'; give more digits"
            )
        newest = found[-1]
        return Resolved(
            name=name,
            version=newest.version,
            digest=newest.digest,
            deprecated=marks.why_deprecated(newest.version),
        )


def _latest(name: str, newest: int, marks: Marks) -> int:
    """Return the newest version that is not deleted."""
    version = newest
    while version in marks.deleted:
        version -= 1
    if not version:
        marks.check_there(name, newest)
    return version
