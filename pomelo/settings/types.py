"""The types of settings: how a value is read, and why it is refused."""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field
from yarl import URL

from pomelo import secrets
from pomelo.network.addresses import check_network, is_loopback, normalize_origin, split_address
from pomelo.stores import STORES

_PLAN_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BUCKET = re.compile(r"(s3|gs)://[^/?#@\s]+(/[^?#\s]*)?|az://[^/?#@\s]+/[^?#\s]+")

_PG_HOST = r"(\[[^/?#@\[\]]*\]|[^/?#@:,\[\]]*)(:[0-9]+)?"
_POSTGRES = re.compile(
    rf"postgresql://([^/?#\[\]]*@)?{_PG_HOST}(,{_PG_HOST})*(/[^?#@]*)?(\?([^?#=&]+=[^#]*)?)?"
)

_SIZE = re.compile(r"\s*[0-9]+(\.[0-9]+)?\s*[A-Za-z]*\s*")
_SPACE = re.compile(r"\s")

_EXPECTED = {
    "extra_forbidden": "there is no such key",
    "bool_parsing": "must be 1 or 0",
    "byte_size": "must be a number of bytes, such as 8388608 or 8MiB",
    "byte_size_unit": "must be a number of bytes, such as 8388608 or 8MiB",
    "float_parsing": "must be a number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number with fewer digits",
}
"""What errors of pydantic say in place of its own texts, by their type."""


def describe_refusal(error_type: str, message: str) -> str:
    """Returns what is wrong with a value, without the value, for an error of pydantic."""
    return _EXPECTED.get(error_type) or message.removeprefix("Value error, ").replace(
        "Input should ", "must "
    )


def _size(value: Any) -> Any:
    # ByteSize reads the beginning of a text: 8,388,608 as 8 bytes.
    if isinstance(value, bool) or (isinstance(value, str) and not _SIZE.fullmatch(value)):
        raise ValueError(_EXPECTED["byte_size"])
    return value


def _address(text: str) -> str:
    if text:
        split_address(text)
    return text


def _url(text: str) -> str:
    if not text:
        return text
    if not text.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    try:
        host = URL(text).host
    except ValueError:
        host = None
    if not host or _SPACE.search(text):
        raise ValueError(
            "must be the URL of a server, such as https://api.example or http://10.0.0.5:8000/v1"
        )
    return text.rstrip("/")


def _base_url(text: str) -> str:
    if "?" in text or "#" in text:
        raise ValueError("must have no ? and no #: paths are appended to it")
    return text


def _store(text: str) -> str:
    if text in ("", "sqlite:"):
        return "sqlite:"
    schemes = tuple(beginning for beginning in STORES if beginning != "sqlite:")
    if not text.startswith(schemes):
        raise ValueError(f"must be sqlite: (in the data folder), or begin with {', '.join(schemes)}")
    return text


def _archive(text: str) -> str:
    if text == "sqlite:" or (text and not text.startswith(("sqlite:", "postgresql://"))):
        raise ValueError("must be sqlite:PATH or begin with postgresql://")
    # With other characters, a part of the password is taken for the host, the port or the database.
    if text.startswith("postgresql://") and not _POSTGRES.fullmatch(text):
        raise ValueError(
            "must be postgresql://USER:PASSWORD@HOST/DATABASE. In a password, write / ? # [ ] as "
            "%2F %3F %23 %5B %5D"
        )
    return text


def _bucket(url: str) -> str:
    if url and not _BUCKET.fullmatch(url):
        raise ValueError("must be s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://ACCOUNT/CONTAINER/PREFIX")
    return url


def _utf8(text: str) -> str:
    """Refuses bytes that are not UTF-8: an error when they are encoded later would show a secret."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8 text") from None
    return text


def _secret(text: str) -> str:
    if text and len(text) < secrets.MIN_LENGTH:
        raise ValueError(f"must have at least {secrets.MIN_LENGTH} characters. Run: openssl rand -hex 32")
    return text


def _folder(path: Any) -> Any:
    if path == "":  # else it would be the working directory
        raise ValueError("must be a folder, such as .pomelo")
    return path


def _file(path: Path | None) -> Path | None:
    try:
        found = path is None or path.is_file()
    except OSError as error:  # without the value, which may be the key itself
        raise ValueError(f"can't be read: {error.strerror}") from None
    if not found:
        raise ValueError("is not a file")
    return path


def _alert_url(text: str) -> str:
    try:
        url = URL(text)
    except ValueError:
        url = URL()
    if (
        not url.host
        or _SPACE.search(text)
        or not (url.scheme == "https" or (url.scheme == "http" and is_loopback(url.host)))
    ):
        raise ValueError("must be https://HOST/PATH, or http:// on this machine")
    return text


def _alert_secret(text: str) -> str:
    with suppress(ValueError):
        if text.startswith("whsec_") and 24 <= len(base64.b64decode(text[6:], validate=True)) <= 64:
            return text
    raise ValueError("must be whsec_ and 24 to 64 bytes in base64. Without it, POMELO_SECRET is used")


def _api_key(text: str | None) -> str | None:
    return None if text is None else text.strip()


def _split(text: Any) -> Any:
    return [part.strip() for part in text.split(",") if part.strip()] if isinstance(text, str) else text


def _split_secrets(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    # POMELO_SECRET may have had a line end, as the files of some secret stores do: then it is part of it.
    both = [(part.strip(), part.strip(" ")) for part in text.split(",") if part.strip()]
    return [secret for pair in both for secret in dict.fromkeys(pair)]


def _origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    if "*" in origins and len(origins) > 1:
        raise ValueError("* allows every origin: give it alone, or leave it out")
    return origins


def _plan(name: str) -> str:
    if not _PLAN_NAME.fullmatch(name):
        raise ValueError("a name has 1 to 64 letters, digits, dots, dashes or underscores")
    return name


Address = Annotated[str, AfterValidator(_address)]
Store = Annotated[str, AfterValidator(_utf8), AfterValidator(_store)]
Archive = Annotated[str, AfterValidator(_utf8), AfterValidator(_archive)]
Bucket = Annotated[str, AfterValidator(_bucket)]
Secret = Annotated[str, AfterValidator(_utf8), AfterValidator(_secret)]
PlanName = Annotated[str, AfterValidator(_plan)]
Size = Annotated[ByteSize, BeforeValidator(_size)]
MessageSize = Annotated[Size, Field(gt=0, le=2**29)]
"""Bytes. gRPC counts those of a message in 31 bits, and receives up to twice the limit."""
Limit = Annotated[int, Field(strict=True, gt=0, lt=2**53)]
ApiKey = Annotated[str | None, AfterValidator(_api_key)]
"""A vendor's key, without the line end that a file of it has."""
Url = Annotated[str, AfterValidator(_url)]
BaseUrl = Annotated[Url, AfterValidator(_base_url)]
Origin = Annotated[str, AfterValidator(normalize_origin)]
Network = Annotated[str, AfterValidator(check_network)]
Folder = Annotated[Path, BeforeValidator(_folder)]
File = Annotated[Path | None, AfterValidator(_file)]
Origins = Annotated[tuple[Origin, ...], BeforeValidator(_split), AfterValidator(_origins)]
Secrets = Annotated[tuple[Secret, ...], BeforeValidator(_split_secrets)]
Urls = Annotated[tuple[Url, ...], BeforeValidator(_split)]
AlertUrls = Annotated[tuple[Annotated[str, AfterValidator(_alert_url)], ...], BeforeValidator(_split)]
AlertSecrets = Annotated[tuple[Annotated[str, AfterValidator(_alert_secret)], ...], BeforeValidator(_split)]
Networks = Annotated[tuple[Network, ...], BeforeValidator(_split)]
"""Several values in one text, separated by commas."""


class PlanSettings(BaseModel):
    """A plan of the operator, `[plans.NAME]`: the limits of each mode of an account. None: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    requests_per_minute: Limit | None = None
    concurrent_requests: Limit | None = None
    tokens_per_minute: Limit | None = None
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
