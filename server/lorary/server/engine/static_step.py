"""Decode steps of fixed shapes, for CUDA graphs.

A decode step's shapes depend on how many rows it has, how long the longest of them is, and on its largest
rank. Here each of the three is rounded up to one of a few *forms*; rows that only fill a form up read
nothing and write into a block that is nobody's. Everything that changes from step to step is one buffer of
numbers: filled in on the host, brought over in one copy, read by kernels where it lies. So on a GPU the
whole forward of a form is captured once, at start, and a step is one copy and one launch: the Python and
the launches of a step, which take longer than the card does, are gone.

Eager and captured steps are the same code but for one line (``StaticSteps.forward``), and that is how the
CPU's tests run it. Where a replay does not give what the eager step gives, nothing captured is used.

Other steps (prompts, drafts, merged weights, compositions of more ranks than one adapter may have) have no
form, and run as before.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from lorary.errors import ConfigError
from lorary.server.adapters.layers import step_segments
from lorary.server.adapters.segments import Segments
from lorary.server.adapters.tiles import TILE_FIELDS, RowTiles
from lorary.server.engine.attention import AttentionPlan, cache_rows, step_plan
from lorary.server.engine.blocks import BLOCK, blocks_for
from lorary.server.engine.upload import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from lorary.server.engine.batch import Batch
    from lorary.server.engine.kv_cache import KVCache

logger = logging.getLogger(__name__)

_FIRST_BLOCKS = 2048 // BLOCK
_MORE_BLOCKS = 8
"""Tables have room for 2,048 positions, and eight times as many from form to form."""
_FIRST_RANK = 16
_MORE_RANKS = 4
_TOLERANCE = 2.0**-6
"""Of a replay against the eager step, over the largest logit: bfloat16 rounds by 2^-8."""


@dataclass(frozen=True, slots=True, order=True)
class Form:
    """Shapes of a step: rows, blocks of the longest row, and ranks of the largest adapter (0: none)."""

    rows: int
    blocks: int
    rank: int


def sizes_up_to(most: int, first: int, factor: int) -> list[int]:
    """Return ``first``, and ``factor`` times as much from one to the next; the last one is ``most``."""
    found = []
    while first < most:
        found.append(first)
        first *= factor
    return [*found, most]


class _Buffer:
    """What one form's steps are told, here and on the device.

    Attributes:
        form: its shapes.
        graph: the captured forward; None where it runs eagerly.
        segments: over the tiles there; None without adapters.
    """

    def __init__(self, form: Form, cache: KVCache) -> None:
        self.form = form
        self.graph: Any = None
        self._cache = cache
        device = cache.k.device
        rows, ranks = form.rows, form.rows * form.rank
        shapes: dict[str, tuple[int, ...]] = {
            "tokens": (rows,),
            "positions": (rows,),
            "lengths": (rows,),
            "table": (rows, form.blocks),
        }
        if form.rank:
            shapes |= {"tiles": (rows * TILE_FIELDS,), "rows": (rows,)}
            shapes |= {"rank_rows": (ranks,), "rank_scales": (ranks,)}
        parts = [
            torch.zeros(shape, dtype=torch.float32 if name == "rank_scales" else torch.int32)
            for name, shape in shapes.items()
        ]
        self._here = pack(parts, pin=device.type == "cuda")
        self._there = torch.zeros_like(self._here, device=device)
        # Written through NumPy: a few numbers through torch cost microseconds each.
        self._of: dict[str, np.ndarray[Any, Any]] = {
            name: part.numpy() for name, part in zip(shapes, unpack(self._here, parts), strict=True)
        }
        there = dict(zip(shapes, unpack(self._there, parts), strict=True))
        self._on_device = there
        self._heads = torch.arange(cache.shape.num_kv_heads, device=device)
        self._laid: Segments | None = None
        self.segments: Segments | None = None
        if form.rank:
            tiles = RowTiles(
                tiles=there["tiles"].view(rows, TILE_FIELDS),
                rows=there["rows"],
                rank_rows=there["rank_rows"],
                rank_scales=there["rank_scales"],
                num_tiles=rows,
                num_sums=ranks,
                max_rank=form.rank,
            )
            self.segments = Segments.of_tiles(tiles)

    def fill(self, batch: Batch) -> None:
        """Write a decode step's numbers, here."""
        count, of, plan = batch.plan.num_decode, self._of, batch.plan
        of["tokens"][:count] = batch.token_ids.numpy()[0]
        of["positions"][:count] = batch.position_ids.numpy()[0]
        of["lengths"][:count] = plan.lengths.numpy()
        tables = self._cache.tables.numpy()
        of["table"][:count] = tables[plan.slots.numpy(), : self.form.blocks]
        # A row of no positions reads nothing; what it writes goes where nobody reads.
        for name in ("tokens", "positions", "lengths"):
            of[name][count:] = 0
        of["table"][count:] = self._cache.scratch
        segments = batch.segments
        if segments is None or segments is self._laid:
            return
        tiling = segments.tiling
        of["tiles"][len(tiling.tiles) :] = 0
        for name in ("tiles", "rows", "rank_rows", "rank_scales"):
            numbers = getattr(tiling, name)
            of[name][: len(numbers)] = numbers
        self._laid = segments

    def fill_for_trial(self) -> None:
        """Write rows of one position each, in places of their own; adapters are the pool's first rows."""
        of, rows, rank = self._of, self.form.rows, self.form.rank
        row = torch.arange(rows).numpy()
        of["tokens"][:] = row % 7
        # A block may be written at any of its positions; none of them is anybody's yet.
        of["table"][:] = (row // BLOCK % self._cache.num_blocks)[:, None]
        of["positions"][:] = row % BLOCK
        of["lengths"][:] = row % BLOCK + 1
        if rank:
            tiles = of["tiles"].reshape(rows, TILE_FIELDS)
            tiles[:] = [0, 1, 0, rank, 0, -1]
            tiles[:, 0] = row
            tiles[:, 4] = row * rank
            of["rows"][:] = row
            of["rank_rows"][:] = 0
            of["rank_scales"][:] = 0.0
        self._laid = None

    def upload(self) -> None:
        """Bring the numbers over, without waiting for it."""
        self._there.copy_(self._here, non_blocking=True)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, AttentionPlan]:
        """Return token ids and positions int64 [1, rows], and the plan, made on the device alone."""
        there, rows = self._on_device, self.form.rows
        positions = there["positions"].long()
        block = there["table"].gather(1, (positions // BLOCK)[:, None]).long()[:, 0]
        index = cache_rows(block, positions, self._heads)
        # What is asked of the host's side of a plan is never asked of this one.
        plan = AttentionPlan(self._cache, there["lengths"], positions, rows, (), there["lengths"])
        plan.place([index, there["table"], there["lengths"]])
        return there["tokens"].long()[None], positions[None], plan


class StaticSteps:
    """A model's decode steps in fixed shapes; used on the engine thread.

    Args:
        model: whose linear layers and attention are Lorary's.
        cache: with a block to spare (``scratch``).
        max_rows: most rows of a step.
        max_rank: most ranks of an adapter.

    Raises:
        ConfigError: the Triton kernels do not serve this device.
    """

    def __init__(self, model: Any, cache: KVCache, *, max_rows: int, max_rank: int) -> None:
        if not cache.has_triton or cache.scratch < 0:
            raise ConfigError(
                "--cuda-graphs needs an NVIDIA GPU whose kernels Triton compiles; leave it out here"
            )
        self._model = model
        self._cache = cache
        self._device = cache.k.device
        self._rows = sizes_up_to(max_rows, 1, 2)
        self._blocks = sizes_up_to(blocks_for(cache.shape.context), _FIRST_BLOCKS, _MORE_BLOCKS)
        self._ranks = [0, *sizes_up_to(max_rank, _FIRST_RANK, _MORE_RANKS)]
        self._buffers: dict[Form, _Buffer] = {}
        vocab = int(model.get_input_embeddings().weight.shape[0])
        # One for all forms: who reads a step's logits has done so before the next one.
        self._logits = torch.zeros(max_rows, vocab, device=self._device)

    @property
    def forms(self) -> list[Form]:
        """All forms, the largest first: what a capture takes, smaller ones find taken already."""
        return sorted(
            (Form(*f) for f in product(self._rows, self._blocks, self._ranks)), reverse=True
        )

    @property
    def num_ready(self) -> int:
        """How many forms steps run in: all of them once prepared, or none, where they could not be captured."""
        return len(self._buffers)

    @torch.inference_mode()
    def prepare(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Make every form, and capture it where the device is a GPU; while nobody has a block.

        Where one cannot be captured none is used: the log says why, and steps run as without forms.
        """
        forms = self.forms
        capture = _Capture(self._device) if self._device.type == "cuda" else None
        for done, form in enumerate(forms, 1):
            buffer = _Buffer(form, self._cache)
            if capture is not None and (problem := self._capture(buffer, capture)):
                logger.warning("decode steps are not captured: %s: %s", form, problem)
                self._buffers.clear()
                return
            self._buffers[form] = buffer
            if progress is not None:
                progress(done, len(forms))

    def form_of(self, batch: Batch) -> Form | None:
        """Return the form that a step has room in; None when it has none."""
        plan, segments = batch.plan, batch.segments
        if plan.chunks or not plan.num_decode or batch.merged is not None:
            return None
        rank = 0 if segments is None else max(entry.rank for entry in segments.entries)
        sizes = (
            _first_of(self._rows, plan.num_decode),
            _first_of(self._blocks, blocks_for(plan.longest)),
            _first_of(self._ranks, rank),
        )
        rows, blocks, ranks = sizes
        if rows is None or blocks is None or ranks is None:
            return None
        return Form(rows, blocks, ranks)

    def forward(self, batch: Batch) -> torch.Tensor | None:
        """Run a decode step; return its logits float32 [rows, vocab], valid until the next step.

        Returns None, and has done nothing, for a step that has no form.
        """
        form = self.form_of(batch)
        buffer = None if form is None else self._buffers.get(form)
        if buffer is None:
            return None
        buffer.fill(batch)
        buffer.upload()
        buffer.graph.replay() if buffer.graph is not None else self._run(buffer)
        return self._logits[: batch.plan.num_decode]

    def _run(self, buffer: _Buffer) -> None:
        """Make the step that the buffer tells of, from its numbers on the device; the logits are ``_logits``."""
        token_ids, position_ids, plan = buffer.inputs()
        with step_plan(plan), step_segments(buffer.segments):
            output = self._model(input_ids=token_ids, position_ids=position_ids, use_cache=False)
        self._logits[: buffer.form.rows].copy_(output.logits[0])

    def _capture(self, buffer: _Buffer, capture: _Capture) -> str:
        """Capture a form's step; return why it cannot be, or ``""``."""
        buffer.fill_for_trial()
        buffer.upload()
        rows = slice(0, buffer.form.rows)
        # What is compiled and allocated at first use must be there before.
        capture.run(lambda: self._run(buffer))
        eager = self._logits[rows].clone()
        try:
            graph = capture.record(lambda: self._run(buffer))
        except RuntimeError as error:
            return str(error)
        self._logits.zero_()
        graph.replay()
        if not _agrees(self._logits[rows], eager):
            return "a replay gave other logits"
        buffer.graph = graph
        return ""


class _Capture:
    """A stream to capture on, and the memory that all graphs share: they never run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, call: Callable[[], None]) -> None:
        """Call it on the stream, and wait until it is done."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            call()
        self._stream.synchronize()

    def record(self, call: Callable[[], None]) -> Any:
        """Return the graph of what the call launches; loads on other threads may go on meanwhile."""
        graph = torch.cuda.CUDAGraph()
        options: dict[str, Any] = {"pool": self._pool, "stream": self._stream}
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
            call()
        return graph


def _agrees(replayed: torch.Tensor, eager: torch.Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    difference = (replayed - eager).abs().max()
    return bool(difference <= _TOLERANCE * eager.abs().max())


def _first_of(sizes: Sequence[int], needed: int) -> int | None:
    """Return the smallest of ascending sizes that has room."""
    return next((size for size in sizes if size >= needed), None)
