"""``python -m lorary.registry`` is the ``registry`` command."""

from lorary.registry.cli import main

if __name__ == "__main__":
    main()
