"""``python -m lorary.trainer RECIPE``."""

from lorary.trainer.cli import main

if __name__ == "__main__":
    main()
