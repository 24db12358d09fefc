"""Any host that speaks chat completions, made from a row of data: Together, Groq, OpenRouter, vLLM and so on.

Whoever opens the providers calls `host` with a row, and `Compatible` with the result; the engine calls
`text`. A new host is a row and no code. No host is known here by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from pomelo.catalog.rows import Name, Row, suggest, wrong_values
from pomelo.catalog.toml_file import dotted
from pomelo.providers import Credentials
from pomelo.providers.base import CODES
from pomelo.providers.chat.chat import Chat, Profile, StreamUsage, TokensField
from pomelo.providers.http.client import Http

PARAMETERS = frozenset(
    ("max_tokens", "temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty", "user")
)
"""What a caller may give beside the messages; `allow` and `drop` of a row name some of them."""

_URL = re.compile(r"https?://[!-~]+")
_HEADER = re.compile(r"[A-Za-z0-9-]+")
_VALUE = re.compile(r"[ -~]*")


def _parameter(name: str) -> str:
    if name not in PARAMETERS:
        raise ValueError(f"no parameter is called {name[:100]}. {suggest(name, sorted(PARAMETERS))}")
    return name


def _code(code: str) -> str:
    if code not in CODES:
        raise ValueError(f"must be an error that a provider may raise. {suggest(code, sorted(CODES))}")
    return code


def _url(text: str) -> str:
    if not _URL.fullmatch(text):
        raise ValueError("must begin with http:// or https://")
    return text


def _headers(headers: dict[str, str]) -> dict[str, str]:
    if not all(_HEADER.fullmatch(name) and _VALUE.fullmatch(value) for name, value in headers.items()):
        raise ValueError("must have names and values that HTTP headers can have")
    return headers


_Parameters = list[Annotated[str, AfterValidator(_parameter)]]


def _bounded(drop: list[str]) -> list[str]:
    if "max_tokens" in drop:
        raise ValueError("must not have max_tokens: without it nothing bounds what a task costs")
    return drop


def _bounding(allow: list[str]) -> list[str]:
    if "max_tokens" not in allow:
        raise ValueError("must have max_tokens: without it nothing bounds what a task costs")
    return allow


class HostRow(Row):
    """A host: where it is, and how it differs, as `Profile` says. `allow` are the only parameters that it
    takes."""

    base_url: Annotated[str, AfterValidator(_url)] | None = None
    credentials: Name | None = None
    max_tokens_field: TokensField | None = None
    seed_field: Name | None = None
    user_field: Name | None = None
    user_most: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    stream_usage: StreamUsage | None = None
    stream_options: dict[str, Any] | None = None
    key_needed: bool | None = None
    drop: Annotated[_Parameters, AfterValidator(_bounded)] | None = None
    allow: Annotated[_Parameters, AfterValidator(_bounding)] | None = None
    extra: dict[str, Any] | None = None
    headers: Annotated[dict[str, str], AfterValidator(_headers)] | None = None
    meanings: dict[str, Annotated[str, AfterValidator(_code)]] | None = None
    patient: bool | None = None
    reports_cost: bool | None = None


class Compatible(Chat):
    """A host as a provider of text. Its base URL ends where /chat/completions begins: mostly in /v1."""

    def __init__(self, credentials: Credentials, http: Http, profile: Profile) -> None:
        base = credentials.base_url.rstrip("/")
        super().__init__(credentials.api_key, base and base + "/chat/completions", profile, http)


def host(name: str, row: Mapping[str, Any]) -> Profile:
    """The profile of the host `name` from its row, whose keys are those of `HostRow`.

    Raises:
        ValueError: the row has an unknown key or a wrong value; the message names it.
    """
    for place, said in wrong_values(HostRow, row):
        raise ValueError(f"host {name}: {dotted(place)}: {said}")
    drop, allow = frozenset(row.get("drop", ())), frozenset(row.get("allow", PARAMETERS))
    knobs = {knob.name: row[knob.name] for knob in fields(Profile) if knob.name in row}
    return Profile(name, **{**knobs, "drop": drop | (PARAMETERS - allow)})
