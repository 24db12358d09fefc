"""Pomelo runs AI tasks for other software: one contract, over gRPC and REST.

Importing the package loads nothing; start at `pomelo.app`.
"""

__version__ = "0.1.0"
