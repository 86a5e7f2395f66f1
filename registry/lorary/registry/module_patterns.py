"""Match module names against the patterns of an ``adapter_config.json``, as PEFT does.

PEFT treats ``target_modules`` (when it is one text) and the keys of ``rank_pattern`` and
``alpha_pattern`` as regular expressions. They come from strangers, and a regular expression can run
for years; so whatever is more than a plain name is matched in a process of its own with a time limit.
Canonical adapters hold plain names only and never get there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from typing import Any, Final

from lorary.errors import CorruptArtifact
from lorary.registry.strict_json import show

MATCH_TIMEOUT_S: Final = 5.0
_MAX_PATTERNS: Final = 256
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.-]+")
_MATCHER: Final = """
import json, re, sys
job = json.load(sys.stdin)
json.dump([[n for n in job["names"] if re.fullmatch(p, n)] for p in job["patterns"]], sys.stdout)
"""


def is_plain(name: str) -> bool:
    """Tell whether a key is a name and no pattern."""
    return _PLAIN.fullmatch(name) is not None


def matching_names(pattern: str, names: Collection[str]) -> set[str]:
    """Return which ``names`` the regular expression matches in full.

    Raises:
        CorruptArtifact: it does not compile, or takes longer than ``MATCH_TIMEOUT_S``.
    """
    return set(_match_apart([pattern], names, [pattern])[0])


def first_matches(keys: Sequence[str], names: Collection[str]) -> dict[str, str]:
    """Return for every name the first key that matches it or a dotted end of it; none, no entry.

    A dot in a plain key stands for a dot.

    Raises:
        CorruptArtifact: a key does not compile, or takes longer than ``MATCH_TIMEOUT_S``.
    """
    if not keys:
        return {}
    plain = {key: i for i, key in enumerate(keys) if _PLAIN.fullmatch(key)}
    odd = [(i, key) for i, key in enumerate(keys) if key not in plain]
    best: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        found = [plain[end] for end in ends if end in plain]
        if found:
            best[name] = min(found)
    if odd:
        patterns = [rf"(?:.*\.)?(?:{key})" for _, key in odd]
        matched = _match_apart(patterns, names, [key for _, key in odd])
        for (i, _), hits in zip(odd, matched, strict=True):
            for name in hits:
                best[name] = min(i, best.get(name, i))
    return {name: keys[i] for name, i in best.items()}


def _match_apart(
    patterns: list[str], names: Collection[str], originals: Sequence[str]
) -> list[list[str]]:
    if len(originals) > _MAX_PATTERNS:
        raise CorruptArtifact(
            f"adapter_config.json has {len(originals)} patterns in one key; {_MAX_PATTERNS} are "
            "accepted. Write plain module names."
        )
    for original in originals:
        try:
            re.compile(original)
        except (re.error, RecursionError, OverflowError) as error:
            raise CorruptArtifact(
                f"adapter_config.json has {show(original)}, which is no regular expression: {error}"
            ) from error
    job = json.dumps({"patterns": patterns, "names": sorted(names)})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=job,
            capture_output=True,
            text=True,
            timeout=MATCH_TIMEOUT_S,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise CorruptArtifact(
            f"adapter_config.json has a regular expression ({show(originals[0])}) that takes longer "
            f"than {MATCH_TIMEOUT_S:g} s; write the module names as a list"
        ) from error
    except subprocess.CalledProcessError as error:
        raise CorruptArtifact(
            f"adapter_config.json has a regular expression ({show(originals[0])}) that cannot be "
            f"matched: {error.stderr.strip().splitlines()[-1:]}"
        ) from error
    matched: Any = json.loads(done.stdout)
    return [list(hits) for hits in matched]
