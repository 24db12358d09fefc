"""Pomelo runs AI tasks for other software: one API, available over gRPC and REST.

Importing the package loads nothing else; `pomelo.app` starts a server.
"""

from __future__ import annotations

from pkgutil import extend_path

# Callers' stubs of the protobuf files are modules `pomelo.v1`, in a folder `pomelo` elsewhere on sys.path.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"


def install_command(extra: str) -> str:
    """The command that installs Pomelo with an extra, for messages."""
    return f"pip install 'pomelo-tasks[{extra}]'"
