"""Rows of catalogue files."""

from __future__ import annotations

from pathlib import Path

from pomelo.catalog.catalog import Catalog

LIMITS = {
    "text": "max_input_tokens = 100, max_output_tokens = 100",
    "image": "max_characters = 100",
    "text_to_speech": "max_characters = 100",
    "speech_to_speech": "max_audio_seconds = 100",
    "speech_to_text": "max_audio_seconds = 100",
}
UNITS = {
    "text": "million_output_tokens",
    "image": "image",
    "text_to_speech": "thousand_characters",
    "speech_to_speech": "audio_minute",
    "speech_to_text": "audio_minute",
}
"""Task type -> a unit of its price."""


def entry(
    name: str, task_type: str = "image", route: str = "", *, unit: str = "", price: str = "", more: str = ""
) -> str:
    """A row with one route; the price of `unit` (by default one of the task type) is 1."""
    price = price or f'{unit or UNITS[task_type]} = "1"'
    return f'''
[models.{name}]
type = "{task_type}"
limits = {{ {LIMITS[task_type]} }}
price = {{ {price} }}
price_version = "2026-11-22"
{more}
[[models.{name}.routes]]
provider = "p"
model = "m"
{route}
'''


def load(folder: Path, text: str) -> Catalog:
    path = folder / "catalog.toml"
    path.write_text(text)
    return Catalog.load(path)
