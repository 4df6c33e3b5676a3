"""``ia2``, ``python -m ia2`` and ``accelerate launch -m ia2``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run a command; an interrupt while it is still being imported is no traceback either."""
    try:
        from ia2.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
