"""`python -m undivided` is the command `undivided`."""

from __future__ import annotations

from undivided.cli import main

if __name__ == "__main__":
    main()
