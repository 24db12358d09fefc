"""The sandbox: a provider that answers every task type itself: the same input always gives the same output.

It answers the tasks of test keys. It uses no network and no randomness, and the clock only for the reset time
in the message of a provoked rate limit. docs/sandbox.md describes it for users.
"""

from __future__ import annotations

from pomelo.providers.sandbox.provider import Sandbox

__all__ = ["Sandbox"]
