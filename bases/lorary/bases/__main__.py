"""``python -m lorary.bases fetch``: the assets command where only this package is installed."""

import sys

from lorary.bases.cli import app
from lorary.errors import LoraryError, outcome

if __name__ == "__main__":
    try:
        app(prog_name="python -m lorary.bases")
    except LoraryError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(outcome(error).exit_code)
