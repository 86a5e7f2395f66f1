"""``python -m lorary.trainer.search.worker FOLDER``: one of several processes of a search."""

from __future__ import annotations

import sys
from pathlib import Path

from lorary.registry.cli_support import exit_code_of
from lorary.trainer.threads import use_threads


def main() -> None:
    """Work until all trials are taken; leave with the exit code of ``lorary.errors``."""
    use_threads(None)

    def call() -> None:
        from lorary.trainer.search.run import work

        work(Path(sys.argv[1]))

    sys.exit(exit_code_of(call))


if __name__ == "__main__":
    main()
