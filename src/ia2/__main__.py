"""``ia2``, ``python -m ia2`` and ``accelerate launch -m ia2``."""

from __future__ import annotations

import atexit
import gc
import sys


def main() -> None:
    """Run a command; an interrupt while it is still being imported is no traceback either."""
    atexit.register(gc.freeze)  # no search for garbage in what ends with the process
    try:
        from ia2.utils.imports import uncollected

        with uncollected():
            from ia2.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
