"""Pomelo runs AI tasks for other software: one contract, over gRPC and REST.

Importing the package loads nothing; start at `pomelo.app`.
"""

from __future__ import annotations

__version__ = "0.1.0"
