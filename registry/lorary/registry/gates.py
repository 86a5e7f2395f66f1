"""Whether an alias may move, and whether a version may go: rules, checked when nobody can come between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from lorary.errors import AdapterNotFound, InvalidRequest, Refused
from lorary.registry.aliases import Admit, AliasMove
from lorary.registry.backend import Store
from lorary.registry.marks import Mark
from lorary.registry.requirements import (
    Figure,
    Requirement,
    check_figures,
    measure,
    parse_requirement,
)


def gate(store: Store, name: str, *, require: Sequence[str] = (), force: bool = False) -> Admit:
    """Return what admits the moves of one adapter's aliases.

    A version that was deleted is refused. What ``require`` asks for must be met. Beyond that, a protected
    alias is moved only to what meets its requirements, or by ``force`` with a reason; it returns to where
    it was with a reason alone, for what it returns to was let in before.

    Args:
        store: where the adapter is.
        name: the adapter.
        require: requirements of this move (``requirements``).
        force: move a protected alias whatever its requirements say.

    Raises:
        InvalidRequest: a requirement cannot be read.
    """
    asked = [parse_requirement(text) for text in require]

    def admit(move: AliasMove) -> AliasMove:
        marks = store.marks(name)
        if move.to_version is not None:
            marks.check_there(name, move.to_version)
        protection = marks.protected.get(move.alias)
        if move.canary is not None:
            marks.check_there(name, move.canary.version)
            return move if protection is None else _admitted_canary(store, name, move, protection)
        if protection is None or move.from_version == move.to_version:
            rules: list[Requirement] = []
        else:
            _check_reason(name, move, force=force)
            rules = [parse_requirement(text) for text in protection.require]
        figures = figures_of(store, name, move, [*rules, *asked]) if move.to_version else ()
        what = f"alias '{move.alias}' of '{name}' was not moved to version {move.to_version}"
        check_figures(what, figures[len(rules) :])
        needs_force = protection is not None and bool(
            move.from_version != move.to_version
            and move.kind == "set"
            and (not rules or move.to_version is None or not all(f.is_met for f in figures))
        )
        if needs_force and not force:
            check_figures(f"{what}; it is protected", figures)
            raise Refused(
                f"alias '{move.alias}' of '{name}' is protected {protection}. Move it with --force and "
                "--reason, or ask whoever protected it."
            )
        return dataclasses.replace(move, figures=figures, forced=needs_force)

    return admit


def _admitted_canary(store: Store, name: str, move: AliasMove, protection: Mark) -> AliasMove:
    """Admit a canary behind a protected alias: callers will meet it, so it must meet the same rules."""
    assert move.canary is not None
    what = f"version {move.canary.version} of '{name}' was not made the canary of '{move.alias}'"
    candidate = dataclasses.replace(move, to_version=move.canary.version)
    rules = [parse_requirement(text) for text in protection.require]
    figures = figures_of(store, name, candidate, rules)
    check_figures(f"{what}; the alias is protected", figures)
    if not rules and not move.reason.strip():
        raise Refused(f"{what}: the alias is protected {protection}. Say why with --reason.")
    return dataclasses.replace(move, figures=figures)


def figures_of(
    store: Store,
    name: str,
    move: AliasMove,
    requirements: Sequence[Requirement],
) -> tuple[Figure, ...]:
    """Compare the version that an alias is to point at with requirements.

    Args:
        store: where the adapter is.
        name: the adapter.
        move: the move, with the version.
        requirements: what is asked.
    """
    target = move.to_version or 0

    def metrics_of(version: int) -> Mapping[str, float]:
        pointer = store.pointer(name, version)
        if pointer is None:
            raise AdapterNotFound(f"adapter '{name}' has no version {version}")
        store.marks(name).check_there(name, version)
        metrics = store.manifest(name, pointer).metrics
        return {} if metrics is None else metrics.figures()

    state = store.alias_state(name)
    return tuple(
        measure(one, target, alias=move.alias, state=state, metrics_of=metrics_of)
        for one in requirements
    )


def deletable(store: Store, name: str, version: int) -> Callable[[], None]:
    """Return what refuses to delete a version that is gone, or that an alias points at."""

    def allow() -> None:
        store.marks(name).check_there(name, version)
        used = {alias: at for alias, at in store.alias_state(name).items() if at == version}
        splits = store.alias_splits(name).values()
        canaries = [f"the canary of {s.alias}" for s in splits if s.canary.version == version]
        users = [*sorted(used), *canaries]
        if users:
            raise Refused(
                f"version {version} of '{name}' is in use: {', '.join(users)} "
                f"point{'s' if len(users) == 1 else ''} at it. Move it first."
            )

    return allow


def _check_reason(name: str, move: AliasMove, *, force: bool) -> None:
    if move.reason.strip():
        return
    if force:
        raise InvalidRequest("--force needs a --reason: it is kept in the log", field="reason")
    if move.kind == "rollback":
        raise Refused(f"alias '{move.alias}' of '{name}' is protected; a rollback needs a --reason")
