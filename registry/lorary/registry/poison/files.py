"""Files that may not be in an adapter's folder, or are not what their name says."""

from __future__ import annotations

import gzip
import io
import os
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from lorary.registry.folder import CONFIG_FILE, README_FILE, TENSORS_FILE
from lorary.registry.poison.attack import Attack, Victim, corrupt

_CALL: Final = b"poison was loaded"
# Both print a line when they are unpickled; a real one would start a shell.
_PICKLE: Final = (
    b"\x80\x02cbuiltins\nprint\nX" + len(_CALL).to_bytes(4, "little") + _CALL + b"\x85R."
)
_PICKLE_OF_OLD: Final = b"cbuiltins\nprint\n(S'" + _CALL + b"'\ntR."
_MANY: Final = 300
_CYRILLIC_A: Final = "\N{CYRILLIC SMALL LETTER A}"


def _bytes(name: str, content: bytes) -> Callable[[Victim], None]:
    def change(victim: Victim) -> None:
        file = victim.path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)

    return change


def _zip(size: int, name: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(size))
    return packed.getvalue()


def _torch_checkpoint(victim: Victim) -> None:
    with zipfile.ZipFile(victim.tensors, "w") as archive:
        archive.writestr("archive/data.pkl", _PICKLE)


def _zip_bomb(victim: Victim) -> None:
    victim.tensors.write_bytes(_zip(32 << 20, "archive/data/0"))


def _link(name: str, target: str) -> Callable[[Victim], None]:
    def change(victim: Victim) -> None:
        (victim.path / name).unlink(missing_ok=True)
        (victim.path / name).symlink_to(target)

    return change


def _hard_link(victim: Victim) -> None:
    secret = victim.path.parent / f"{victim.path.name}.secret"
    secret.write_text("somebody else's file\n")
    os.link(secret, victim.path / README_FILE)


def _fifo(victim: Victim) -> None:
    os.mkfifo(victim.path / README_FILE)


def _socket(victim: Victim) -> None:
    # Bound under a short name and moved: the address of a socket has at most 107 bytes.
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            os.chdir(victim.path)
            listener.bind(README_FILE)
        finally:
            os.chdir(here)


def _set_user(victim: Victim) -> None:
    victim.config.chmod(0o4755)


def _many(victim: Victim) -> None:
    (victim.path / "report").mkdir()
    for i in range(_MANY):
        (victim.path / "report" / f"{i}.txt").touch()


def _sparse(name: str, size: int) -> Callable[[Victim], None]:
    def change(victim: Victim) -> None:
        with (victim.path / name).open("wb") as file:
            file.truncate(size)  # takes no space

    return change


def _without(*names: str) -> Callable[[Victim], None]:
    def change(victim: Victim) -> None:
        for name in names:
            (victim.path / name).unlink()

    return change


def _folder(victim: Victim) -> None:
    (victim.path / "checkpoint-1").mkdir()
    (victim.path / "checkpoint-1" / "optimizer.pt").write_bytes(_PICKLE)


_NOT_ALLOWED: Final = "may not be in an adapter folder"
_ANOTHER: Final = "not what its name says"

ATTACKS: Final[tuple[Attack, ...]] = (
    corrupt("files", "pickle-renamed", "A pickle called .safetensors; unpickling runs code.",
            "pickle", _bytes(TENSORS_FILE, _PICKLE)),
    corrupt("files", "pickle-of-protocol-0", "A pickle of the old text form, which has no mark to know it by.",
            "not safetensors", _bytes(TENSORS_FILE, _PICKLE_OF_OLD)),
    corrupt("files", "pickle-beside", "adapter_model.bin beside the weights; loaders that look for it unpickle it.",
            _NOT_ALLOWED, _bytes("adapter_model.bin", _PICKLE)),
    corrupt("files", "torch-checkpoint-renamed", "A torch.save archive called .safetensors.",
            "zip archive", _torch_checkpoint),
    corrupt("files", "zip-bomb-renamed", "30 kB that unpack to 32 MB, called .safetensors.",
            "zip archive", _zip_bomb),
    corrupt("files", "zip-bomb-as-readme", "An archive that unpacks to 32 MB where a text is expected.",
            _ANOTHER, _bytes(README_FILE, _zip(32 << 20, "x"))),
    corrupt("files", "gzip-as-tokenizer", "A compressed file where a tokenizer is expected.",
            _ANOTHER, _bytes("tokenizer.json", gzip.compress(bytes(1 << 20)))),
    corrupt("files", "gguf-renamed", "A GGUF file called .safetensors, for a second parser.",
            "GGUF", _bytes(TENSORS_FILE, b"GGUF\x03\0\0\0" + bytes(64))),
    corrupt("files", "hdf5-renamed", "An HDF5 file called .safetensors.",
            "HDF5", _bytes(TENSORS_FILE, b"\x89HDF\r\n\x1a\n" + bytes(64))),
    corrupt("files", "numpy-pickle-as-image", "A NumPy file of objects, which is a pickle, called .png.",
            _ANOTHER, _bytes("report/curve.png", b"\x93NUMPY\x01\0" + _PICKLE)),
    corrupt("files", "program-as-readme", "An ELF program called README.md.",
            _ANOTHER, _bytes(README_FILE, b"\x7fELF\x02\x01\x01" + bytes(64))),
    corrupt("files", "script-as-readme", "A shell script called README.md.",
            _ANOTHER, _bytes(README_FILE, b"#!/bin/sh\nexit 66\n")),
    corrupt("files", "python-module", "Python that auto_map-style loaders import.",
            _NOT_ALLOWED, _bytes("modeling_adapter.py", b"raise SystemExit(66)\n")),
    corrupt("files", "shared-object", "A native library beside the weights.",
            _NOT_ALLOWED, _bytes("kernels.so", b"\x7fELF" + bytes(64))),
    corrupt("files", "second-weights", "A second file of weights, for loaders that take what they find.",
            _NOT_ALLOWED, _bytes("adapter_model-00002.safetensors", bytes(64))),
    corrupt("files", "symlink-to-a-secret", "A link to a file of the machine, which would be published.",
            "symbolic link", _link(README_FILE, "/etc/hostname")),
    corrupt("files", "symlink-as-weights", "Weights that are a link to a file elsewhere.",
            "symbolic link", _link(TENSORS_FILE, "/etc/hostname")),
    corrupt("files", "symlink-to-an-endless-device", "A configuration that never ends: /dev/zero.",
            "symbolic link", _link(CONFIG_FILE, "/dev/zero")),
    corrupt("files", "symlink-to-a-folder", "A report that is the machine's root folder.",
            _NOT_ALLOWED, _link("report", "/")),
    Attack(name="hard-link", kind="files", what="A second name of somebody else's file, which would be published.",
           says="hard link", change=_hard_link, only_at_push=True),
    corrupt("files", "pipe", "A named pipe; reading it waits for ever.", "not a plain file", _fifo),
    corrupt("files", "socket", "A socket in place of a text.", "not a plain file", _socket),
    corrupt("files", "set-user-bit", "A file that would run as its owner.", "set-user", _set_user),
    corrupt("files", "folder-of-checkpoints", "A folder of training state, pickles included.",
            "checkpoint-1", _folder),
    corrupt("files", "hidden-file", "A dot file, which listings do not show.",
            _NOT_ALLOWED, _bytes(".profile", b"exit 66\n")),
    corrupt("files", "backslashes-in-a-name", "A name that climbs folders where it is unpacked on Windows.",
            _NOT_ALLOWED, _bytes("..\\..\\adapter.json", b"{}")),
    corrupt("files", "newline-in-a-name", "A name that breaks lines of logs and lists.",
            _NOT_ALLOWED, _bytes("a\nb.md", b"x")),
    corrupt("files", "terminal-codes-in-a-name", "A name that moves the cursor of who lists it.",
            _NOT_ALLOWED, _bytes("\x1b[2Ka.md", b"x")),
    corrupt("files", "name-of-255-bytes", "The longest name that a file can have.",
            _NOT_ALLOWED, _bytes("a" * 252 + ".md", b"x")),
    corrupt("files", "look-alike-name", "adapter_config.json with a Cyrillic a, beside the real one.",
            _NOT_ALLOWED, _bytes(f"{_CYRILLIC_A}dapter_config.json", b"{}")),
    corrupt("files", "right-to-left-name", "A name that is shown backwards: 'gpj.md' is 'dm.jpg'.",
            _NOT_ALLOWED, _bytes("\N{RIGHT-TO-LEFT OVERRIDE}dm.jpg", b"x")),
    corrupt("files", "names-that-differ-in-case", "Two files that are one on some systems.",
            "differ only in case", _bytes("Adapter_Config.json", b"{}")),
    corrupt("files", "too-many-files", f"{_MANY} files.", "more than 256", _many),
    corrupt("files", "huge-configuration", "A configuration of 5 MB.",
            "the limit is", _sparse(CONFIG_FILE, 5 << 20)),
    corrupt("files", "huge-readme", "A text of 65 MB.", "the limit is", _sparse(README_FILE, 65 << 20)),
    corrupt("files", "no-configuration", "Weights without a configuration.",
            f"no {CONFIG_FILE}", _without(CONFIG_FILE)),
    corrupt("files", "no-weights", "A configuration without weights.",
            f"no {TENSORS_FILE}", _without(TENSORS_FILE)),
)  # fmt: skip
