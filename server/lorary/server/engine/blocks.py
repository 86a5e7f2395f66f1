"""Who has which block of the cache, and which beginnings of prompts blocks still hold; no torch.

A block is ``BLOCK`` positions of one sequence, in every layer. Blocks that are full are kept in a tree,
one for each adapter's digest (keys and values depend on the adapter, and on whether it is merged) and tenant (how soon an answer
comes would tell one what another has asked): a path from its root spells the
tokens that its blocks hold. An aLoRA begins in the base's tree: its blocks that end before its
invocation are the base's, shared with the base and all aLoRAs; those behind are its own, and only for an
invocation at this very position, even where the tokens are the same. A new prompt walks down as far as it agrees and uses those blocks as its
own beginning, together with everybody else who does; from a block that it agrees with in part it takes
a copy of that part (copy on write). Nobody writes into a block of the tree beyond what its node names.

States of a block::

    free  → owned by one sequence → in the tree, used by n sequences → in the tree, idle → free
                └──────────────────────────────→ free

Idle blocks go when a free one is needed: leaves of the tree first, the one longest unused first. So
what is remembered costs no memory that anybody needs.

With shared layers (``--shared-layers``) blocks are known by one more tree, of the tenant alone (``_Below``): in
it are the blocks, of whichever tree, whose positions the base's own layers have computed as far as the shared ones
go. Those are the base's, and those of *late* adapters, whose pages hold nothing of these layers. A new
prompt of the base or of a late adapter takes a copy of that part of them where its own tree ends, and only the
layers behind are run. Whole blocks only; and a copy, so that a block has one owner in all layers.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorary.server.engine.request import BASE

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Tokens

    from lorary.server.engine.request import Owner, Request
    from lorary.server.engine.sequence import Sequence

BLOCK = 32
"""Positions of a block: the width of the native kernels' panels."""
LEAST_SHARED = 16
"""Shorter beginnings are read again: finding and copying them is not free."""
WORTH_WAITING = 64
"""A prompt waits for another one that is being read when it then saves at least this many tokens."""
_TAIL = 8
"""Tokens by which children that agree in part are found."""
_LOOKED_AT = 8
"""Of these children, how many are compared: what a template has in common, they all have."""


class _Below:
    """Blocks that hold the same in the shared layers: one node of a tenant's tree of these.

    There is no such node without a block but the root: where a block is, those before it in its own tree are,
    too, and a leaf of that tree goes first.
    """

    __slots__ = ("children", "nodes", "parent", "salt", "tokens")

    def __init__(self, tokens: tuple[int, ...], parent: _Below | None, salt: str) -> None:
        self.tokens = tokens
        self.parent = parent
        self.salt = salt
        self.children: dict[tuple[int, ...], _Below] = {}
        # By when they came; the values say nothing.
        self.nodes: dict[Node, None] = {}


class Node:
    """One block in the tree; a root has none.

    Attributes:
        block: the block; -1 for a root.
        tokens: what it holds, at most ``BLOCK``; fewer only in a leaf.
        children: the nodes behind it by their owners and tokens.
        tails: the same, oldest first, by whose beginnings they have, and the beginnings of their tokens.
        owner: whose keys and values it ends with.
        num_base: how many of its positions, from the first on, are the base's.
        scope: a root's.
        num_users: running sequences whose path leads through it.
        below: where it is in the tree of shared layers; None where its layers are not all the base's that far.
    """

    __slots__ = (
        "below",
        "block",
        "children",
        "num_base",
        "num_users",
        "owner",
        "parent",
        "scope",
        "tails",
        "tokens",
    )

    def __init__(
        self,
        block: int,
        tokens: tuple[int, ...],
        parent: Node | None,
        *,
        owner: Owner = BASE,
        num_base: int = 0,
        scope: tuple[str, str] = ("", ""),
    ) -> None:
        self.scope = scope
        self.owner = owner
        self.num_base = num_base
        self.block = block
        self.tokens = tokens
        self.parent = parent
        self.children: dict[tuple[Owner, tuple[int, ...]], Node] = {}
        self.tails: dict[tuple[Owner, tuple[int, ...]], list[Node]] = {}
        self.num_users = 0
        self.below: _Below | None = None

    @property
    def tail_keys(self) -> list[tuple[Owner, tuple[int, ...]]]:
        """Where its parent lists it among its tails: the block of an invocation also begins as the base's."""
        owners = [self.owner]
        if self.owner != BASE and self.num_base >= _TAIL:
            owners.append(BASE)
        return [(owner, self.tokens[:_TAIL]) for owner in owners]


@dataclass(frozen=True, slots=True)
class Shared:
    """What a new sequence need not compute.

    Attributes:
        path: nodes whose blocks are its beginning.
        source: a block that holds the next ``tail`` positions, to be copied; -1 when ``tail`` is 0.
        tail: less than ``BLOCK``.
        below: blocks whose shared layers hold the positions behind ``path``, to be copied; then there is no tail.
    """

    path: tuple[Node, ...] = ()
    source: int = -1
    tail: int = 0
    below: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Positions that need not be computed at all."""
        return len(self.path) * BLOCK + self.tail

    @property
    def num_below(self) -> int:
        """Positions whose shared layers need not be computed; 0 where no more than ``length``."""
        return (len(self.path) + len(self.below)) * BLOCK if self.below else 0


class Blocks:
    """All blocks of a cache; the engine thread's alone.

    With ``share`` off nothing is remembered and every sequence has blocks of its own. The first
    ``shared_layers`` layers are shared between the base and late adapters.
    """

    def __init__(self, num_blocks: int, *, share: bool = True, shared_layers: int = 0) -> None:
        self.num_blocks = num_blocks
        self.share = share
        self.shared_layers = shared_layers
        # The lowest first: memory that was never written costs nothing on a CPU.
        self._free = list(range(num_blocks))
        self._roots: dict[tuple[str, str], Node] = {}
        # By the tenant's salt.
        self._below: dict[str, _Below] = {}
        # Leaves that nobody uses, the longest unused first; and how many nodes nobody uses.
        self._idle_leaves: OrderedDict[Node, None] = OrderedDict()
        self._num_idle = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be had, idle ones included."""
        return len(self._free) + self._num_idle

    @property
    def num_idle(self) -> int:
        """Blocks that are kept for what they hold."""
        return self._num_idle

    def look_up(self, sequence: Sequence, running: Iterable[Sequence]) -> Shared | None:
        """Find what a sequence shares with the tree and with running ones; changes nothing.

        Returns:
            What it shares, or None when it is better to wait until a running prompt has been read.
        """
        if not self.share or sequence.request.needs_every_row:
            return Shared()
        request, tokens = sequence.request, sequence.token_ids
        # The last token is always read: its logits choose the next one.
        limit = len(tokens) - 1
        shared = self._walk(request, tokens, limit)
        coming = 0
        for other in running:
            most = min(limit, request.same_until(other.request))
            if not most:
                continue
            same = common_length(other.token_ids, tokens, most)
            there = min(same, other.num_computed)
            if there > shared.length and there // BLOCK == len(shared.path):
                source = other.blocks[len(shared.path)]
                shared = Shared(shared.path, source, there % BLOCK)
            if other.is_prefilling:
                coming = max(coming, min(same, len(other.token_ids)))
        if coming >= shared.length + WORTH_WAITING:
            return None
        if shared.length < LEAST_SHARED:
            shared = Shared()
        return self._with_below(sequence, shared, limit, running) if self.shared_layers else shared

    def _walk(self, request: Request, tokens: list[int], limit: int) -> Shared:
        node = self._roots.get(request.scope)
        path: list[Node] = []
        while node is not None:
            start = len(path) * BLOCK
            child = None
            stop = start + BLOCK
            if stop <= limit:
                child = node.children.get((_owner(request, stop), tuple(tokens[start:stop])))
            if child is None:
                return self._with_tail(node, path, request, tokens[start:limit])
            path.append(child)
            node = child
        return Shared()

    def _with_tail(self, node: Node, path: list[Node], request: Request, rest: list[int]) -> Shared:
        """Add the child that agrees with ``rest`` the longest, among the newest that do at all."""
        source, tail = -1, 0
        own, front = request.owner, tuple(rest[:_TAIL])
        num_base = request.num_base - len(path) * BLOCK
        # Only an aLoRA has more than one owner's blocks in its tree.
        for owner in (own, BASE) if request.active_from else (own,):
            for child in node.tails.get((owner, front), ())[-_LOOKED_AT:]:
                most = BLOCK - 1
                if child.owner != own:
                    most = min(most, child.num_base, num_base)
                same = common_length(child.tokens, rest, most)
                if same > tail:
                    source, tail = child.block, same
        return Shared(tuple(path), source, tail)

    def _with_below(
        self, sequence: Sequence, shared: Shared, limit: int, running: Iterable[Sequence]
    ) -> Shared | None:
        """Add the blocks whose shared layers go on behind ``shared``; None when it is better to wait for some."""
        if not self._is_base_below(sequence):
            return shared
        tokens, salt = sequence.token_ids, sequence.request.salt
        found: list[int] = []
        node = self._below.get(salt)
        for stop in range(BLOCK, limit + 1, BLOCK):
            node = None if node is None else node.children.get(tuple(tokens[stop - BLOCK : stop]))
            if node is None:
                break
            found.append(next(reversed(node.nodes)).block)
        needed = max(shared.length, len(found) * BLOCK) + WORTH_WAITING
        if limit >= needed and any(
            other.is_prefilling
            and other.request.salt == salt
            and self._keeps(other)
            and self._is_base_below(other)
            and common_length(other.token_ids, tokens, needed) == needed
            for other in running
        ):
            return None
        if len(found) * BLOCK < shared.length + BLOCK:
            return shared
        return Shared(shared.path, below=tuple(found[len(shared.path) :]))

    def _is_base_below(self, sequence: Sequence) -> bool:
        """Whether the base's own weights alone compute the shared layers of all that a sequence reads.

        Said of the pages that its rows are multiplied by, not of what any configuration promises.
        """
        if sequence.merged is not None:
            return False
        if not sequence.request.lease.digest:
            return True
        return sequence.entry is not None and sequence.entry.first_layer >= self.shared_layers

    def take(
        self, sequence: Sequence, shared: Shared, num_positions: int, *, spare: int = 0
    ) -> bool:
        """Give a sequence that has nothing its beginning, and blocks for ``num_positions``.

        Args:
            sequence: gets ``blocks`` and ``path``; ``num_computed`` and ``num_below`` are the caller's affair,
                as is the copy of ``shared.tail`` positions from ``shared.source`` into its first own block,
                or of the shared layers of ``shared.below`` into its first own blocks: before
                the next step writes, for a source may be an idle block that has just changed hands.
            shared: what ``look_up`` returned just now.
            num_positions: at least ``shared.length``.
            spare: blocks that must still be free afterwards, for those who run already.

        Returns:
            False, and nothing has changed, when there are too few.
        """
        for node in shared.path:
            self._use(node)
        needed = blocks_for(num_positions) - len(shared.path)
        if needed + spare > self.num_free:
            for node in reversed(shared.path):
                self._let_go(node)
            return False
        sequence.path = list(shared.path)
        sequence.blocks = [node.block for node in shared.path]
        sequence.blocks += [self._allocate() for _ in range(needed)]
        return True

    def grow(self, sequence: Sequence, num_positions: int) -> bool:
        """Give a sequence blocks for ``num_positions`` in all; False, unchanged, when too few are free."""
        needed = blocks_for(num_positions) - len(sequence.blocks)
        if needed > self.num_free:
            return False
        sequence.blocks += [self._allocate() for _ in range(needed)]
        return True

    def publish(self, sequence: Sequence) -> None:
        """Put into the tree what a sequence has filled since the last time."""
        if not self._keeps(sequence):
            return
        while (len(sequence.path) + 1) * BLOCK <= sequence.num_computed:
            start = len(sequence.path) * BLOCK
            tokens = tuple(sequence.token_ids[start : start + BLOCK])
            node = self._child(sequence, tokens)
            self._use(node)
            sequence.path.append(node)

    def release(self, sequence: Sequence) -> None:
        """Take everything back from a sequence; what it computed stays in the tree, idle."""
        self.publish(sequence)
        kept = {node.block for node in sequence.path}
        start = len(sequence.path) * BLOCK
        tail = tuple(sequence.token_ids[start : sequence.num_computed])
        if self._keeps(sequence) and len(tail) >= _TAIL:
            node = self._child(sequence, tail)
            if node in self._idle_leaves:
                self._idle_leaves.move_to_end(node)
            kept.add(node.block)
        for node in reversed(sequence.path):
            self._let_go(node)
        for block in sequence.blocks:
            if block not in kept:
                heapq.heappush(self._free, block)
        sequence.blocks, sequence.path = [], []

    def _keeps(self, sequence: Sequence) -> bool:
        return self.share and sequence.request.keep_prefix

    def _child(self, sequence: Sequence, tokens: tuple[int, ...]) -> Node:
        """Return the node behind a sequence's path, made of the sequence's own block if it is new."""
        request = sequence.request
        parent = sequence.path[-1] if sequence.path else self._roots.get(request.scope)
        if parent is None:
            parent = self._roots[request.scope] = Node(-1, (), None, scope=request.scope)
        start = len(sequence.path) * BLOCK
        owner = _owner(request, start + len(tokens))
        node = parent.children.get((owner, tokens))
        if node is None:
            node = Node(
                sequence.blocks[len(sequence.path)],
                tokens,
                parent,
                owner=owner,
                num_base=min(max(request.num_base - start, 0), len(tokens)),
            )
            parent.children[owner, tokens] = node
            is_shared = self.shared_layers and len(tokens) == BLOCK
            if is_shared and (owner == BASE or self._is_base_below(sequence)):
                self._add_below(node, parent)
            for key in node.tail_keys:
                parent.tails.setdefault(key, []).append(node)
            self._num_idle += 1
            self._idle_leaves[node] = None
        return node

    def _add_below(self, node: Node, parent: Node) -> None:
        """Make known a new node whose shared layers are the base's, unless those of what is before it are not."""
        before = parent.below
        if parent.parent is None:
            salt = parent.scope[1]
            before = self._below.get(salt)
            if before is None:
                before = self._below[salt] = _Below((), None, salt)
        if before is None:
            return
        below = before.children.get(node.tokens)
        if below is None:
            below = before.children[node.tokens] = _Below(node.tokens, before, before.salt)
        below.nodes[node] = None
        node.below = below

    def _forget_below(self, node: Node) -> None:
        below = node.below
        if below is None:
            return
        del below.nodes[node]
        if below.nodes:
            return
        before = below.parent
        assert before is not None, "a root has no blocks"
        del before.children[below.tokens]
        if before.parent is None and not before.children:
            del self._below[before.salt]

    def _use(self, node: Node) -> None:
        if not node.num_users:
            self._num_idle -= 1
            self._idle_leaves.pop(node, None)
        node.num_users += 1

    def _let_go(self, node: Node) -> None:
        node.num_users -= 1
        if not node.num_users:
            self._num_idle += 1
            if not node.children:
                self._idle_leaves[node] = None

    def _allocate(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        node, _ = self._idle_leaves.popitem(last=False)
        self._num_idle -= 1
        self._forget(node)
        return node.block

    def _forget(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None, "a root has no block to give"
        self._forget_below(node)
        del parent.children[node.owner, node.tokens]
        for key in node.tail_keys:
            tails = parent.tails[key]
            tails.remove(node)
            if not tails:
                del parent.tails[key]
        if parent.children:
            return
        if parent.parent is None:
            del self._roots[parent.scope]
        elif not parent.num_users:
            self._idle_leaves[parent] = None


def _owner(request: Request, stop: int) -> Owner:
    """Return whose keys and values a block of the request ends with, if it ends before ``stop``."""
    return BASE if stop <= request.num_base else request.owner


def blocks_for(num_positions: int) -> int:
    """Return how many blocks hold this many positions."""
    return -(-num_positions // BLOCK)


def common_length(a: Tokens[int], b: Tokens[int], limit: int) -> int:
    """Return how many tokens at the front are the same, at most ``limit``."""
    high = min(len(a), len(b), limit)
    if high <= 0:
        return 0
    if list(a[:high]) == list(b[:high]):
        return high
    low = 0
    while high - low > 1:
        # The first `low` are the same; some of the first `high` are not.
        middle = (low + high) // 2
        if list(a[low:middle]) == list(b[low:middle]):
            low = middle
        else:
            high = middle
    return low
