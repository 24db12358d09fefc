"""The sandbox: a provider that answers every kind of task by itself, the same for the same input.

The engine gives it the tasks of test keys. It knows no network, no chance and no clock (but for the time that
a provoked rate limit names), and it ships: docs/sandbox.md tells users what it does.
"""

from __future__ import annotations

from pomelo.providers.sandbox.provider import Sandbox

__all__ = ["Sandbox"]
