"""Install the benchmark's peers: ``python -m benchmarks.peers [NAME ...]``.

An installation that is complete is left as it is; one that was interrupted is taken up again.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.peers import llama_cpp, openvino_install, vllm
from benchmarks.peers.catalog import LLAMA_CPP, OPENVINO, PEERS, VLLM
from benchmarks.peers.steps import InstallError, say

INSTALLERS = {
    VLLM.name: vllm.install,
    OPENVINO.name: openvino_install.install,
    # The longest last.
    LLAMA_CPP.name: llama_cpp.install,
}


def main(arguments: list[str]) -> int:
    """Install the named peers, all by default; return the exit code."""
    parser = argparse.ArgumentParser(prog="make peers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(INSTALLERS)}")
    names: list[str] = parser.parse_args(arguments).names or list(INSTALLERS)
    unknown = sorted(set(names) - set(INSTALLERS))
    if unknown:
        parser.error(f"there is no peer '{unknown[0]}'; there are {', '.join(INSTALLERS)}")
    failed = []
    for name in names:
        peer = PEERS[name]
        if peer.is_installed:
            say(f"have {name} {peer.version} in '{peer.folder}'")
            continue
        peer.folder.mkdir(parents=True, exist_ok=True)
        try:
            INSTALLERS[name]()
        except InstallError as error:
            # The others are of use without it.
            say(f"error: {name} {peer.version}: {error}")
            failed.append(name)
            continue
        peer.stamp()
        say(f"installed {name} {peer.version} in '{peer.folder}'")
    if failed:
        say(f"not installed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
