"""Runs `pomelo` as `python -m pomelo.cli`."""

from __future__ import annotations

from pomelo.cli import main

if __name__ == "__main__":
    main()
