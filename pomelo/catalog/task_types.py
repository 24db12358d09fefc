"""What the catalogue and the guard of providers need to know of each task type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TaskTypeRow:
    """One task type.

    `limits` are those that a model of the type must have; `price_units` are the units of its usage: a price
    in another unit would never be charged. `price_example` is a line of a catalogue. `events` are those that
    a provider yields; `output` is the output of its `completed`, empty if it yields none.
    """

    limits: tuple[str, ...]
    price_units: tuple[str, ...]
    price_example: str
    events: frozenset[str]
    output: str = ""


TASK_TYPE_ROWS: Mapping[str, TaskTypeRow] = {
    "text": TaskTypeRow(
        limits=("max_input_tokens", "max_output_tokens"),
        price_units=(
            "million_input_tokens",
            "million_output_tokens",
            "million_cached_input_tokens",
            "million_cache_write_input_tokens",
            "million_cache_write_1h_input_tokens",
        ),
        price_example='price = { million_input_tokens = "4", million_output_tokens = "20" }',
        events=frozenset({"text_delta", "tool_call_delta", "completed"}),
        output="text",
    ),
    "image": TaskTypeRow(
        limits=("max_characters",),
        price_units=("image", "megapixel"),
        price_example='price = { image = "0.04" }',
        events=frozenset({"image_progress", "completed"}),
        output="image",
    ),
    "text_to_speech": TaskTypeRow(
        limits=("max_characters",),
        price_units=("thousand_characters",),
        price_example='price = { thousand_characters = "0.08" }',
        events=frozenset({"audio_chunk"}),
    ),
    "speech_to_speech": TaskTypeRow(
        limits=("max_audio_seconds",),
        price_units=("audio_minute", "audio_hour"),
        price_example='price = { audio_minute = "0.12" }',
        events=frozenset({"audio_chunk"}),
    ),
    "speech_to_text": TaskTypeRow(
        limits=("max_audio_seconds",),
        price_units=("audio_minute", "audio_hour"),
        price_example='price = { audio_hour = "0.22" }',
        events=frozenset({"completed"}),
        output="transcription",
    ),
}
"""The task types by their name, which is also the field of TaskSpec.input and the providers' method."""
