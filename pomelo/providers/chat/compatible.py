"""Any OpenAI-compatible host, from a row of the catalogue: Groq, OpenRouter, vLLM and so on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from pomelo.catalog.rows import Name, Row, one_of, suggest, wrong_values
from pomelo.catalog.toml_file import dotted
from pomelo.providers.base import Extra
from pomelo.providers.chat.chat import PARAMETERS, Chat, Profile, StreamUsage, TokensField
from pomelo.providers.credentials import Credentials
from pomelo.providers.errors import CODES
from pomelo.providers.http.client import Http

_URL = re.compile(r"https?://[!-~]+")
_HEADER = re.compile(r"[A-Za-z0-9-]+")
_VALUE = re.compile(r"[ -~]*")


def _parameter(name: str) -> str:
    if name not in PARAMETERS:
        raise ValueError(f"no parameter is called {name[:100]}. {suggest(name, sorted(PARAMETERS))}")
    return name


def _url(text: str) -> str:
    if not _URL.fullmatch(text):
        raise ValueError("must begin with http:// or https://")
    if "?" in text or "#" in text:
        raise ValueError("must have no ? and no #: paths are appended to it")
    return text


def _headers(headers: dict[str, str]) -> dict[str, str]:
    if not all(_HEADER.fullmatch(name) and _VALUE.fullmatch(value) for name, value in headers.items()):
        raise ValueError("must have names and values that HTTP headers can have")
    return headers


_Parameters = list[Annotated[str, AfterValidator(_parameter)]]
_Code = Annotated[str, one_of(sorted(CODES), "an error that a provider may raise")]


def _keeps_max_tokens(drop: list[str]) -> list[str]:
    if "max_tokens" in drop:
        raise ValueError("must not have max_tokens: without it nothing bounds what a task costs")
    return drop


def _has_max_tokens(allow: list[str]) -> list[str]:
    if "max_tokens" not in allow:
        raise ValueError("must have max_tokens: without it nothing bounds what a task costs")
    return allow


class HostRow(Row):
    """A host of the catalogue: its base URL, and the values of its `Profile`. `allow` are the only parameters
    that it takes."""

    base_url: Annotated[str, AfterValidator(_url)] | None = None
    credentials: Name | None = None
    max_tokens_field: TokensField | None = None
    seed_field: Name | None = None
    user_field: Name | None = None
    user_most: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    stream_usage: StreamUsage | None = None
    stream_options: dict[str, Any] | None = None
    key_needed: bool | None = None
    drop: Annotated[_Parameters, AfterValidator(_keeps_max_tokens)] | None = None
    allow: Annotated[_Parameters, AfterValidator(_has_max_tokens)] | None = None
    extra: Extra | None = None
    headers: Annotated[dict[str, str], AfterValidator(_headers)] | None = None
    meanings: dict[str, _Code] | None = None
    patient: bool | None = None
    reports_cost: bool | None = None
    message_names: bool | None = None


class Compatible(Chat):
    """A host as a provider of text. Its base URL is what comes before /chat/completions, often with /v1."""

    def __init__(self, credentials: Credentials, http: Http, profile: Profile) -> None:
        self.profile = profile
        super().__init__(credentials, http)


def host(name: str, row: Mapping[str, Any]) -> Profile:
    """Return the profile of the host `name` from its row, which has the keys of `HostRow`.

    Raises:
        ValueError: the row has an unknown key or a wrong value; the message names it.
    """
    for keys, message in wrong_values(HostRow, row):
        raise ValueError(f"host {name}: {dotted(keys)}: {message}")
    drop, allow = frozenset(row.get("drop", ())), frozenset(row.get("allow", PARAMETERS))
    values = {field.name: row[field.name] for field in fields(Profile) if field.name in row}
    return Profile(name, **{**values, "drop": drop | (PARAMETERS - allow)})
