"""``python -m ia2`` and ``accelerate launch -m ia2``."""

from ia2.cli import main

if __name__ == "__main__":
    main()
