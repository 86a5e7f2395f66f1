"""What a Hub says when it refuses: a status, a code that clients look at, and a text for people."""

from __future__ import annotations

from typing import Literal

Code = Literal["", "RepoNotFound", "RevisionNotFound", "EntryNotFound", "GatedRepo"]


class HubProblem(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        message: for people.
        code: by which ``huggingface_hub`` chooses its exception; may be empty.
        headers: further headers of the answer.
    """

    def __init__(
        self, status: int, message: str, *, code: Code = "", headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}


def repo_not_found(repo_id: str, *, is_anonymous: bool) -> HubProblem:
    """Say that a repository does not exist, or that the caller may not know that it does."""
    status = 401 if is_anonymous else 404
    return HubProblem(status, f"Repository {repo_id} not found", code="RepoNotFound")
