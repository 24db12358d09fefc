"""Tool calls in the responses of vendors, whole or in pieces, as the contract has them.

Hosts differ: ids are missing, "null" or the same for two calls, pieces have no index or all have the same,
and arguments are a JSON object instead of its text.

Calls above MAX_TOOL_CALLS are left out, and the answer ends as one that is cut off by its length: the vendor
charges it, and the caller can use the other calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from pydantic_core import from_json

from pomelo.catalog.reported_cost import Report
from pomelo.fields import MAX_CALL_CHARACTERS
from pomelo.gen.v1.text_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, FinishReason, ToolCall
from pomelo.providers.base import Event
from pomelo.providers.guard import MAX_TOOL_CALLS
from pomelo.providers.http.errors import malformed_response
from pomelo.providers.http.parsing import well_formed
from pomelo.providers.text import StreamState


def whole_calls(
    finish: FinishReason.ValueType, calls: Iterable[tuple[Any, Any, Any]]
) -> tuple[FinishReason.ValueType, list[ToolCall]]:
    """Return the finish reason and the calls of a whole response. `finish` is the vendor's reason, `calls`
    has the id, name and arguments of each call; one without any of the three is left out.

    Raises:
        TypeError: arguments of another type.
        UpstreamError: provider_failed; a call without a usable name.
    """
    used: set[str] = set()
    usable: list[ToolCall] = []
    for vendor_id, name, arguments in calls:
        call_id, text = _usable_id(vendor_id), _arguments_text(arguments)
        if not (call_id or name or text):
            continue
        if len(usable) == MAX_TOOL_CALLS:
            return _of_cut_off(finish), usable
        call_id = _unique_id(call_id, used)
        usable.append(ToolCall(id=call_id, name=_usable_name(name), arguments_json=well_formed(text)))
    return finish, usable


@dataclass(slots=True, eq=False)
class _Call:
    """A call that has begun. Its `index` is -1 until its name has arrived. `is_whole`: the piece with its
    name had all of its arguments."""

    id: str
    vendor_id: str
    index: int = -1
    is_whole: bool = False

    def begins_another(self, index: int | None, call_id: str) -> bool:
        """Whether a piece with a name, for this call by its index, begins another call."""
        if self.index < 0:
            return False
        if call_id:
            return call_id != self.vendor_id
        return index is None or self.is_whole


class ToolCallState(StreamState):
    """The state of a stream with tool calls, from the pieces that a vendor sends."""

    __slots__ = ("_by_index", "_ids", "_is_cut_off", "_last", "_named", "_unnamed")

    def __init__(self, report: Report) -> None:
        super().__init__(report)
        self._ids: set[str] = set()
        self._by_index: dict[int, _Call] = {}
        self._last: _Call | None = None
        self._named = self._unnamed = 0
        self._is_cut_off = False
        """Whether calls above MAX_TOOL_CALLS were left out."""

    def add_piece(self, index: Any, call_id: Any, name: Any, arguments: Any) -> None:
        """Add a vendor's piece of a tool call. Any of its values may be missing.

        A piece belongs to the call at its `index`, or to the last call if it has none. It begins another call
        if there is no such call; or if it has a name, and either another id, or no id while the arguments of
        that call are complete. Another id without a name begins none: some hosts make one for each piece.

        Raises:
            TypeError: arguments of another type.
            UpstreamError: provider_failed; a name that can't be one, or arguments before it.
        """
        text = _arguments_text(arguments)
        call_id = _usable_id(call_id)
        if type(index) is not int:
            index = None
        call = self._last if index is None else self._by_index.get(index)
        if call is None or (name and call.begins_another(index, call_id)):
            if not (call_id or name or text):
                return
            if len(self._ids) == MAX_TOOL_CALLS:
                self._is_cut_off = True
                # What follows belongs to the call that is left out, and not to the one before.
                self._last = None
                if index is not None:
                    self._by_index.pop(index, None)
                return
            call = _Call(_unique_id(call_id, self._ids), call_id)
            self._unnamed += 1
            if index is not None:
                self._by_index[index] = call
        self._last = call
        if call.index >= 0:
            if text:
                self.add_tool_call(call.index, text)
        elif name or text:
            call.index = self._named
            call.is_whole = _is_object(text)
            self._named += 1
            self._unnamed -= 1
            self.add_tool_call(call.index, text, call.id, _usable_name(name))

    def completed(self) -> Event:
        if self._unnamed:
            raise malformed_response("a tool call without a name")
        if self._is_cut_off and self.finish is not None:
            self.finish = _of_cut_off(self.finish)
        return super().completed()


def _of_cut_off(finish: FinishReason.ValueType) -> FinishReason.ValueType:
    """The finish reason of an answer whose last calls were left out."""
    return FINISH_REASON_LENGTH if finish == FINISH_REASON_STOP else finish


def _unique_id(call_id: str, used: set[str]) -> str:
    """The id of one more call of a response, added to those in use: the vendor's `call_id`, or a new one if
    that is "" or in use."""
    if not call_id or call_id in used:
        call_id = f"call_{token_hex(12)}"
    used.add(call_id)
    return call_id


def _usable_id(call_id: Any) -> str:
    """A vendor's id of a call; "" for what can't be one."""
    usable = type(call_id) is str and call_id != "null" and len(call_id) <= MAX_CALL_CHARACTERS
    return call_id if usable and call_id.isprintable() else ""


def _usable_name(name: Any) -> str:
    if type(name) is not str or not 0 < len(name) <= MAX_CALL_CHARACTERS:
        raise malformed_response("a tool call without a usable name")
    return well_formed(name)


def _arguments_text(arguments: Any) -> str:
    """A vendor's arguments as text, which may begin or end with half a surrogate pair."""
    if type(arguments) is str:
        return arguments
    if arguments is None:
        return ""
    if type(arguments) is dict:
        return json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    raise TypeError


def _is_object(text: str) -> bool:
    try:
        return type(from_json(well_formed(text))) is dict
    except ValueError:
        return False
