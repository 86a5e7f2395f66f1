"""aLoRA (arXiv 2504.12397, section 3): an adapter that is off until its invocation stands in the prompt.

What the base has computed of a document, an aLoRA reads as it is: a server keeps one copy of those keys and
values for the base and for all aLoRAs. Training is LoRA's, with the change of a layer taken from the positions
before the invocation; they get no gradient. PEFT looks for the invocation's last place in each row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorary.errors import InvalidRecipe
from lorary.registry.invocation import active_from
from lorary.trainer.methods.method import Attached

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lorary.bases.prompts import PromptBuilder
    from lorary.registry.manifest import Method
    from lorary.trainer.encoding import Row


class Alora(Attached):
    """LoRA from the invocation on."""

    # The fast layer knows no positions.
    is_fast = False

    def config(self, targets: str | list[str]) -> Any:
        """Name the invocation; a model without values, which is only weighed, has none to be found."""
        invocation = list(self.setting.invocation) or None
        return self.lora_config(targets, alora_invocation_tokens=invocation)

    def describe(self) -> Method:
        """Return the manifest's account, with the invocation."""
        return replace(super().describe(), invocation_tokens=self.setting.invocation)


def invocation_ids(text: str, builder: PromptBuilder, *, pad_id: int) -> tuple[int, ...]:
    """Return the tokens of a recipe's invocation.

    Raises:
        InvalidRecipe: it ends with the token that fills rows up, so that PEFT would find it in the filling.
    """
    ids = tuple(builder.encode(text))
    if ids[-1] == pad_id:
        raise InvalidRecipe(
            f"method.invocation {text!r} ends with the token that fills rows up (id {pad_id}), so that "
            "the adapter would begin behind the row. Let it end with another token."
        )
    return ids


def check_rows(rows: Iterable[Row], text: str, invocation: Sequence[int]) -> None:
    """Check that every row's adapter begins in its prompt, and where a server will begin.

    Raises:
        InvalidRecipe: a prompt lacks the invocation, or what is learned holds it.
    """
    for number, row in enumerate(rows):
        start = active_from(row.input_ids[: row.num_prompt], invocation)
        _check_found(start, f"row {number}", text, invocation)
        if active_from(row.input_ids, invocation) != start:
            raise InvalidRecipe(
                f"row {number} holds method.invocation {text!r} behind its first prompt: PEFT would begin "
                "there, and a server begins in the prompt. Leave the example out, or choose a text that no "
                "answer holds."
            )


def check_prompts(prompts: Iterable[Sequence[int]], text: str, invocation: Sequence[int]) -> None:
    """Check that every prompt holds the invocation; raises as ``check_rows``.

    Without it PEFT leaves the adapter off, and what is measured is the base.
    """
    for number, prompt in enumerate(prompts):
        _check_found(active_from(prompt, invocation), f"prompt {number}", text, invocation)


def _check_found(start: int | None, where: str, text: str, invocation: Sequence[int]) -> None:
    if start is None:
        raise InvalidRecipe(
            f"{where} lacks the invocation {text!r}, tokens {list(invocation)}: the adapter would be off. "
            "Put it into task.template, where the tokenizer keeps it apart from what stands around it: "
            "special tokens and line breaks are safe."
        )
