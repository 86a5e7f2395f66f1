"""What is known of an owner's repositories: which are adapters, and what their logs say at the head.

A store that watches answers from memory, which a thread renews, and goes on answering while the Hub is
away. Any other asks the Hub again when what it knows is older than ``FRESH_S``.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from lorary.errors import InvalidRef, LoraryError
from lorary.registry.address import hub_owner
from lorary.registry.hub_card import TAG
from lorary.registry.hub_client import HubClient
from lorary.registry.hub_state import NOTHING, HubState, read_state
from lorary.registry.refs import check_name

logger = logging.getLogger(__name__)

FRESH_S: Final = 1.0
"""How old what is known of a repository may be when somebody asks; changes always read anew."""
RENEW_S: Final = 5.0
"""How often a watching store looks for changes."""
_READERS: Final = 8


class HubRepos:
    """The repositories of one owner, with one prefix. Thread-safe.

    Args:
        client: of the Hub.
        address: ``hf://owner`` or ``hf://owner/prefix``.
        watch: answer from memory, and renew it in the background every ``RENEW_S`` seconds.

    Attributes:
        trouble: what the watch met last, if the Hub was away.

    Raises:
        ConfigError: the address is written otherwise.
    """

    def __init__(self, client: HubClient, address: str, *, watch: bool) -> None:
        self._client = client
        self._owner, self._prefix = hub_owner(address)
        self._states: dict[str, tuple[float, HubState]] = {}
        self._known: frozenset[str] | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.trouble = ""
        self._watches = watch
        if watch:
            threading.Thread(target=self._watch, name="registry-watch", daemon=True).start()

    @property
    def url(self) -> str:
        """The registry's address."""
        return f"hf://{self._owner}" + (f"/{self._prefix}" if self._prefix else "")

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()

    def names(self) -> list[str]:
        """Return all adapters that have a version."""
        if self._watches and self._known is not None:
            return sorted(name for name in self._known if self.state(name).newest)
        heads = self._heads()
        with ThreadPoolExecutor(_READERS) as pool:
            states = list(pool.map(lambda item: self._at(*item), heads.items()))
        return sorted(name for name, state in zip(heads, states, strict=True) if state.newest)

    def repo(self, name: str) -> str:
        """Return the repository of an adapter.

        Raises:
            InvalidRef: no repository can have that name.
        """
        if "/" in check_name(name):
            raise InvalidRef(
                f"adapter name '{name}' has a team; on a hub the owner is the team: use registry "
                f"hf://{name.partition('/')[0]} and '{name.partition('/')[2]}'"
            )
        if "--" in name or name.endswith(".git"):
            raise InvalidRef(f"adapter name '{name}' cannot name a repository: '--', '.git'")
        return f"{self._owner}/{f'{self._prefix}-' if self._prefix else ''}{name}"

    def state(self, name: str) -> HubState:
        """Return what is known of an adapter, recent enough."""
        check_name(name)
        known = self._states.get(name)
        if self._watches:
            if known is not None:
                return known[1]
            if self._known is not None and name not in self._known:
                return NOTHING
        elif known is not None and time.monotonic() - known[0] < FRESH_S:
            return known[1]
        return self.renew(name)

    def renew(self, name: str, head: str | None = None) -> HubState:
        """Read what the Hub says now of an adapter; ``head`` if it is known."""
        repo_id = self.repo(name)
        return self._at(name, head or self._client.head(repo_id) or "")

    def _at(self, name: str, head: str) -> HubState:
        known = self._states.get(name)
        if not head:
            with self._lock:
                self._states.pop(name, None)
            return NOTHING
        if known is not None and known[1].head == head:
            state = known[1]
        else:
            state = read_state(self._client, self.repo(name), head)
        if state.newest:
            # Only what exists is remembered: anybody may ask for names that do not.
            with self._lock:
                self._states[name] = (time.monotonic(), state)
        return state

    def _heads(self) -> dict[str, str]:
        """Return the adapters that the Hub lists, with their heads."""
        start = f"{self._owner}/" + (f"{self._prefix}-" if self._prefix else "")
        heads: dict[str, str] = {}
        for repo_id, head in self._client.models(self._owner, TAG).items():
            name = repo_id[len(start) :]
            if repo_id.startswith(start) and _is_name(name):
                heads[name] = head
        return heads

    def _watch(self) -> None:
        """Renew what is in memory until the store is closed; the Hub may be away meanwhile."""
        while not self._stop.is_set():
            try:
                self._look()
            except LoraryError as error:
                if not self.trouble:
                    logger.warning("answering from memory: %s", error)
                self.trouble = str(error)
            else:
                if self.trouble:
                    logger.warning("the hub answers again")
                self.trouble = ""
            self._stop.wait(RENEW_S)

    def _look(self) -> None:
        heads = self._heads()
        with self._lock:
            known = {name: state.head for name, (_, state) in self._states.items()}
        for name, head in known.items():
            if heads.get(name) != head:
                # Lists may lag behind; the repository itself does not.
                self.renew(name)
        self._known = frozenset(heads) | frozenset(self._states)


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except InvalidRef:
        return False
    return "/" not in text
