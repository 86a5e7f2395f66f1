"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorary.server.http.body import Fields
from lorary.server.http.requests import read_messages, read_model
from lorary.server.validate import check_input
from lorary.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from lorary.server.answers import ServerFacts
    from lorary.server.http.call import HttpCall
    from lorary.server.service import InferenceService
    from lorary.server.targets import Prompts
    from lorary.server.validate import Limits


class Tokens:
    """The two endpoints that only read."""

    def __init__(
        self, service: InferenceService, prompts: Prompts, facts: ServerFacts, limits: Limits
    ) -> None:
        self._service = service
        self._limits = limits
        self._prompts = prompts
        self._facts = facts

    async def tokenize(self, call: HttpCall) -> None:
        """Answer ``POST /tokenize``: the ids that a completion or a chat would read."""
        fields = Fields(call.members)
        _, adapter = read_model(fields, self._facts.base)
        prompt = fields.text("prompt")
        has_texts = fields.switch("return_token_strs")
        read = pb.Input(chat=read_messages(fields)) if prompt is None else pb.Input(prompt=prompt)
        # Prompts are taken as they are, and chats end where the answer begins: what vLLM's two
        # switches for it say is not heard.
        fields.finish({"add_special_tokens", "add_generation_prompt"})
        request = pb.TokenizeRequest(adapter=adapter, input=read)
        tokens = await self._service.Tokenize(request, call)
        await call.answer_json(
            {
                "tokens": list(tokens.token_ids),
                "count": len(tokens.token_ids),
                "max_model_len": self._facts.max_context,
                "token_strs": list(tokens.pieces) if has_texts else None,
            }
        )

    async def detokenize(self, call: HttpCall) -> None:
        """Answer ``POST /detokenize``: the text of ids."""
        fields = Fields(call.members)
        read_model(fields, self._facts.base)
        ids = fields.list("tokens", int, "token ids") or []
        fields.finish()
        try:
            message = pb.Input(token_ids=pb.TokenIds(ids=ids))
        except ValueError as error:
            raise fields.error("tokens", f"tokens has an id out of range: {error}.") from error
        check_input(message, self._limits)
        await call.answer_json({"prompt": await self._prompts.text(ids)})
