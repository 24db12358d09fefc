"""An account of the app of each module."""

from __future__ import annotations

import pytest

from tests.app import Account, RunningApp


@pytest.fixture(scope="module")
async def account(app: RunningApp) -> Account:
    return await app.account()
