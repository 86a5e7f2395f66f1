"""What ingress and replicas agree on: how an error crosses Ray Serve, and how a deadline does.

Of a refused call Serve carries a status code and one text, and nothing else.

A replica packs what gRPC would have sent in the trailing metadata into that text, the ingress unpacks it,
and the caller sees what a plain server would have sent: code, message, ``google.rpc`` details, facts.
"""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass

from google.rpc import status_pb2

TIMEOUT_KEY = "lorary-timeout-s"
"""Metadata by which the ingress says how much of the caller's time is left, which Serve does not pass on."""
_MARK = "lorary-refusal:"
_LENGTH_BYTES = 4

Trailing = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status, and the trailing metadata beside it."""

    status: status_pb2.Status
    trailing: Trailing

    def pack(self) -> str:
        """Return it as a text of less than the 4,096 characters at which Serve cuts.

        Its message has at most 700 characters (``status.MAX_MESSAGE_CHARS``) and stands in it twice, so that
        compressed not even 700 characters of four bytes come near the limit.
        """
        status = self.status.SerializeToString()
        trailing = json.dumps(self.trailing, separators=(",", ":")).encode()
        whole = len(status).to_bytes(_LENGTH_BYTES, "big") + status + trailing
        return _MARK + base64.b85encode(zlib.compress(whole, level=1)).decode()

    @classmethod
    def unpack(cls, text: str) -> Refusal | None:
        """Return what was packed; None for a text that no replica wrote."""
        if not text.startswith(_MARK):
            return None
        whole = zlib.decompress(base64.b85decode(text.removeprefix(_MARK)))
        end = _LENGTH_BYTES + int.from_bytes(whole[:_LENGTH_BYTES], "big")
        trailing = tuple((key, value) for key, value in json.loads(whole[end:]))
        return cls(status_pb2.Status.FromString(whole[_LENGTH_BYTES:end]), trailing)
