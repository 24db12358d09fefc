"""Any host that speaks chat completions, made from a row of data: Together, Groq, OpenRouter, vLLM and so on.

Whoever opens the providers calls `host` with a row, and `Compatible` with the result; the engine calls
`text`. A new host is a row and no code. No host is known here by name.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pomelo.providers import Credentials
from pomelo.providers.chat import STREAM_USAGES, Chat, Profile
from pomelo.providers.http import Http

PARAMETERS = frozenset(
    ("max_tokens", "temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty", "user")
)
"""What a caller may give beside the messages; `allow` and `drop` of a row name some of them."""

_KNOBS: Mapping[str, type] = {
    "max_tokens_field": str,
    "seed_field": str,
    "user_field": str,
    "user_most": int,
    "stream_usage": str,
    "stream_options": dict,
    "key_needed": bool,
    "drop": list,
    "allow": list,
    "extra": dict,
    "headers": dict,
    "meanings": dict,
    "patient": bool,
}


class Compatible(Chat):
    """A host as a provider of text. Its base URL ends where /chat/completions begins: mostly in /v1."""

    def __init__(self, credentials: Credentials, http: Http, profile: Profile) -> None:
        base = credentials.base_url.rstrip("/")
        super().__init__(credentials.api_key, base and base + "/chat/completions", profile, http)


def host(name: str, row: Mapping[str, Any]) -> Profile:
    """The profile of the host `name` from its row, whose keys are those of `Profile`, each with the type
    that the profile has, and `allow`: the only parameters that the host takes.

    Raises:
        ValueError: the row has an unknown key or a wrong value; the message names it.
    """
    for knob, value in row.items():
        if knob not in _KNOBS:
            raise ValueError(f"host {name}: nothing is called {knob}; there are {', '.join(_KNOBS)}")
        if type(value) is not _KNOBS[knob]:
            raise ValueError(f"host {name}: {knob} must be of type {_KNOBS[knob].__name__}")
    usage = row.get("stream_usage", "option")
    if usage not in STREAM_USAGES:
        raise ValueError(f"host {name}: stream_usage must be one of {', '.join(STREAM_USAGES)}")
    drop = frozenset(row.get("drop", ()))
    allow = frozenset(row.get("allow", PARAMETERS))
    unknown = sorted((drop | allow) - PARAMETERS)
    if unknown:
        raise ValueError(f"host {name}: no parameter is called {', '.join(unknown)}")
    knobs = {knob.name: row[knob.name] for knob in fields(Profile) if knob.name in row}
    return Profile(name, **{**knobs, "drop": drop | (PARAMETERS - allow)})
