"""Where in a prompt an adapter begins: aLoRA's rule, for registry, trainer and server alike.

An activated LoRA (Greenewald et al. 2025, arXiv 2504.12397, section 3) is off until its *invocation*, a fixed
sequence of tokens: what the base computed for everything before it, keys and values included, is what the
adapter's own pass would have computed. As in PEFT, the last place in the prompt counts, and the adapter is
on from the invocation's first token.
"""

from __future__ import annotations

from collections.abc import Sequence


def active_from(token_ids: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Return the first position of a prompt that the adapter computes.

    Args:
        token_ids: the prompt, without anything of its answer.
        invocation: the adapter's; empty for one that is always on.

    Returns:
        Where the invocation begins for the last time; 0 if there is none to look for; ``None`` if the
        prompt does not hold it.
    """
    if not invocation:
        return 0
    # Searched from behind, where it nearly always is.
    wanted, backwards = list(invocation)[::-1], list(token_ids)[::-1]
    at = -1
    while True:
        try:
            at = backwards.index(wanted[0], at + 1)
        except ValueError:
            return None
        if backwards[at : at + len(wanted)] == wanted:
            return len(backwards) - at - len(wanted)
