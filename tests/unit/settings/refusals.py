"""The errors of settings that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomelo.settings import SettingsError, load


def load_error(environ: dict[str, str], config: Path | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load(config, environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)
