"""The parameters of OpenAI's API for images and audio: their names, and those that have no effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.types.fields import renamed_field
from pomelo.call import Call, report_adjustments
from pomelo.errors import invalid

IMAGES = "/v1/images/generations"
SPEECH = "/v1/audio/speech"
TRANSCRIPTIONS = "/v1/audio/transcriptions"

PARAMETERS: Mapping[str, Mapping[str, str]] = {
    IMAGES: {"width": "size", "height": "size"},
    SPEECH: {"text": "input", "voice_settings.speed": "speed", "output_format": "response_format"},
    TRANSCRIPTIONS: {
        "audio": "file",
        "language_code": "language",
        "timestamps": "timestamp_granularities",
    },
}
"""The parameters of each path that are fields of a task by another name: path -> field -> parameter."""


class Parameters:
    """The parameters of one request of `call` to `path`, while they become the fields of a task.

    What is adjusted is reported under their names.
    """

    def __init__(self, call: Call, path: str) -> None:
        self._call = call
        self._names = PARAMETERS[path]
        self._left_out: list[str] = []
        call.translate_adjusted = self._translate_adjusted

    def check_names(self, body: Mapping[str, Any]) -> None:
        """Refuses fields of a task that have another name here.

        Raises:
            PomeloError: invalid_parameter.
        """
        for field, name in self._names.items():
            if body.get(field) is not None:
                raise renamed_field(field, name)

    def leave_out(self, body: dict[str, Any], parameters: Mapping[str, tuple[Any, ...]]) -> None:
        """Removes parameters that have no effect from a body. Those whose value is not among these, the ones
        that describe what happens anyway, are reported as left out.

        Raises:
            PomeloError: invalid_parameter: there is one, and the caller prefers strict handling.
        """
        for name, usual in parameters.items():
            value = body.pop(name, None)
            if value in (None, "", *usual):
                continue
            if self._call.strict:
                raise invalid(name, f"{', '.join(map(str, usual))} or left out" if usual else "left out")
            self._left_out.append(name)
        if self._left_out:
            report_adjustments(self._call, ())

    def rename_adjusted(self, adjusted: dict[str, str]) -> dict[str, str]:
        """Returns what was adjusted, by parameter, from what was adjusted by field; empty values were left
        out."""
        return {self._names.get(field, field): value for field, value in adjusted.items()}

    def _translate_adjusted(self, header: str) -> str:
        pairs = [item.partition("=") for item in header.split("; ") if item]
        adjusted = self.rename_adjusted({field: value for field, _, value in pairs})
        adjusted.update(dict.fromkeys(self._left_out, ""))
        return "; ".join([f"{name}={value}" if value else name for name, value in adjusted.items()])
