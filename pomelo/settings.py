"""What the operator sets: `pomelo.toml` overridden by environment variables, checked once at start.

`load` is called by the command line; tests make a `Settings` by hand, which reads nothing. Only the command
line and the composition root know this module. It knows no other part of the house.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import stat
import tempfile
import tomllib
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from yarl import URL

PREFIX = "POMELO_"
CONFIG = Path("pomelo.toml")
"""Read from the working directory when neither --config nor POMELO_CONFIG names a file."""

NOT_SETTINGS = frozenset({"POMELO_CONFIG", "POMELO_KEY"})
"""Variables of ours that are no settings: the command line reads them itself."""

_NOT_WRITTEN = frozenset({"providers", "variables"})
"""Settings that are gathered, and have no name of their own in a file or the environment."""

_NO_VARIABLES = _NOT_WRITTEN | {"plans"}
"""Those and the tables of a file, which no variable can hold."""

_PLAN = re.compile(r"[A-Za-z0-9._-]{1,64}")

STORES = ("redis://", "rediss://", "redis+cluster://", "redis+sentinel://")
"""How the address of a store begins that several processes may share."""

_OURS = frozenset({"secret", "secret-check", "pomelo.db", "usage.db"})
"""Files that identify a folder as a Pomelo data folder."""

_MIB = 1024 * 1024
_SECRET_LENGTH = 32
_CHECK = b"pomelo secret check"
_CREDENTIAL = re.compile(r"([a-z][a-z0-9_-]*)_(api_key|base_url)")
"""The settings of a provider. Their variables bear the vendor's own names, which its own tools read, too."""


log = logging.getLogger("pomelo.settings")


class SettingsError(Exception):
    """The settings can't be used; the message says which, and what to do: one line, and of a catalogue one
    for each wrong row."""


def split_address(text: str) -> tuple[str, int]:
    """The host and the port of `host:port` or `[v6]:port`.

    Raises:
        ValueError: it is none.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("must be host:port, such as 127.0.0.1:8080")
    return host, int(port)


def _address(text: str) -> str:
    if text:
        split_address(text)
    return text


def _url(text: str) -> str:
    if text and not text.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    return text.rstrip("/")


def _store(text: str) -> str:
    if text in ("", "sqlite:"):
        return "sqlite:"
    if not text.startswith(STORES):
        raise ValueError(f"must be sqlite: (in the data folder), or begin with {', '.join(STORES)}")
    return text


def _archive(text: str) -> str:
    if text and not text.startswith(("sqlite:", "postgresql://")):
        raise ValueError("must be sqlite:PATH or begin with postgresql://")
    return text


def _secret(text: str) -> str:
    if text and len(text) < _SECRET_LENGTH:
        raise ValueError(f"must have at least {_SECRET_LENGTH} characters, as `openssl rand -hex 32` prints")
    return text


def _file(path: Path | None) -> Path | None:
    if path is not None and not path.is_file():
        raise ValueError("names no file")
    return path


def _split(text: Any) -> Any:
    return [part.strip() for part in text.split(",") if part.strip()] if isinstance(text, str) else text


def _network(text: str) -> str:
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError("must be an IP address or a network, such as 10.0.0.0/8") from error
    return text


def _origin(text: str) -> str:
    """The origin as browsers write it: in lower case, in ASCII, without a default port."""
    if text == "*":
        return text
    try:
        if text.count("/") != 2 or set("?#@*\\ ") & set(text) or not text.isprintable():
            raise ValueError(text)
        return str(URL(text).origin())
    except ValueError:
        raise ValueError(
            "must be * or origins, such as https://app.example or http://localhost:3000: scheme, host and "
            "port, without a path or a slash at the end"
        ) from None


def _origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    if "*" in origins and len(origins) > 1:
        raise ValueError("* allows every origin: give it alone, or leave it out")
    return origins


def _plan(name: str) -> str:
    if not _PLAN.fullmatch(name):
        raise ValueError("a name has 1 to 64 letters, digits, dots, dashes or underscores")
    return name


Address = Annotated[str, AfterValidator(_address)]
PlanName = Annotated[str, AfterValidator(_plan)]
Most = Annotated[int, Field(strict=True, gt=0, lt=2**53)]
Url = Annotated[str, AfterValidator(_url)]
Origin = Annotated[str, AfterValidator(_origin)]
Network = Annotated[str, AfterValidator(_network)]
File = Annotated[Path | None, AfterValidator(_file)]


class ProviderSettings(BaseModel):
    """What the operator gives for one provider. `base_url` is where its API begins; empty: where the vendor
    has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    api_key: str | None = Field(default=None, repr=False)
    base_url: Url = ""


class PlanSettings(BaseModel):
    """A plan of the operator's own, `[plans.NAME]`: what each side of an account may do. None: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    requests_per_minute: Most | None = None
    concurrent_requests: Most | None = None
    tokens_per_minute: Most | None = None
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None


class Settings(BaseModel):
    """Every setting. Made by hand it reads neither files nor variables; see `load`.

    An address is `host:port`, empty where the door is off, port 0 for any free one. Sizes are in bytes and
    may be written as 8MiB, times are in seconds. Relative paths are relative to the working directory;
    those of a file, to the file's folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    rest: Address = "127.0.0.1:8080"
    grpc: Address = "127.0.0.1:50051"
    data: Path = Path(".pomelo")
    store: Annotated[str, AfterValidator(_store)] = Field(default="sqlite:", repr=False)
    archive: Annotated[str, AfterValidator(_archive)] = Field(default="", repr=False)
    """Where usage goes from Redis; empty: a file in the data folder."""
    workers: int = Field(default=1, ge=1, le=64)
    """How many processes serve; more than 1 needs a store that they can share."""
    public_url: Url = ""
    """Where callers reach REST; empty: its address."""
    cors_origins: Annotated[tuple[Origin, ...], BeforeValidator(_split), AfterValidator(_origins)] = ()
    """Origins whose pages may call REST from a browser, such as https://app.example; `*` alone: all."""
    secret: Annotated[str, AfterValidator(_secret)] = Field(default="", repr=False)
    """The root of key peppers and link signatures; empty: the one kept in the data folder."""
    tls_cert: File = None
    tls_key: File = None
    tls_client_ca: File = None
    insecure: bool = False
    catalog: File = None
    """A catalogue of the operator's own, whose entries are added to the built-in ones or replace them."""
    delivery_origins: Annotated[tuple[Url, ...], BeforeValidator(_split)] = ()
    """Where vendors may have put a file besides public addresses, such as http://10.0.0.5:9000."""
    trusted_proxies: Annotated[tuple[Network, ...], BeforeValidator(_split)] = ()
    """Addresses and networks of proxies in front, such as 10.0.0.0/8. Their gRPC connections carry the calls
    of many callers and are not closed for what one caller does; for their REST connections see
    `idle_timeout`."""
    providers: Mapping[str, ProviderSettings] = Field(default_factory=dict, repr=False)
    """By name; `acme_api_key` and `acme_base_url` are short for those of the provider acme."""
    variables: Mapping[str, str] = Field(default_factory=dict, repr=False)
    """Variables of the environment that may be a provider's, such as ACME_API_KEY; they override."""
    json_limit: Annotated[ByteSize, Field(gt=0)] = ByteSize(8 * _MIB)
    upload_limit: Annotated[ByteSize, Field(gt=0)] = ByteSize(50 * _MIB)
    inline_limit: Annotated[ByteSize, Field(gt=0)] = ByteSize(4 * _MIB)
    upstream_connections: int = Field(default=256, ge=1, le=65536)
    """Connections that one process may use to each vendor's host at a time."""
    media_limit: Annotated[ByteSize, Field(gt=0)] = ByteSize(10 * 1024 * _MIB)
    """The most bytes of all media; `media_account_limit` applies to one account and mode."""
    media_account_limit: Annotated[ByteSize, Field(gt=0)] = ByteSize(1024 * _MIB)
    disk_reserve: Annotated[ByteSize, Field(ge=0)] | None = None
    """Disk bytes that media leave free for the ledger; None: 512 MiB, or a tenth of a smaller
    disk."""
    max_calls: int = Field(default=2000, ge=1, le=1_000_000)
    """Calls in flight, of both protocols; one account has at most half of them."""
    max_connections: int = Field(default=4096, ge=8, le=1_000_000)
    """REST connections of all callers together, in each process."""
    idle_timeout: float | None = Field(default=None, ge=1, le=86_400)
    """Seconds that a caller's REST connection may be idle; None: 75, and 650 from `trusted_proxies`."""
    plans: Mapping[PlanName, PlanSettings] = Field(default_factory=dict)
    """Added to the built-in ones; one of the same name replaces it."""
    grace: float = Field(default=10.0, ge=0, le=3600)
    """Seconds that running tasks get to end when the server shuts down."""

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, values: dict[str, Any]) -> dict[str, Any]:
        rest = dict(values)
        providers = dict(rest.get("providers", {}))
        for name in values:
            if name not in cls.model_fields and (credential := _CREDENTIAL.fullmatch(name)):
                provider, kind = credential.groups()
                providers[provider] = {**providers.get(provider, {}), kind: rest.pop(name)}
        return {**rest, "providers": providers}

    @model_validator(mode="after")
    def _tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("POMELO_TLS_CERT and POMELO_TLS_KEY go together: set both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("POMELO_TLS_CLIENT_CA needs POMELO_TLS_CERT and POMELO_TLS_KEY")
        if self.workers > 1 and self.store == "sqlite:":
            raise ValueError(
                "POMELO_WORKERS: SQLite serves one process. For more set POMELO_STORE to a Redis server, "
                "such as redis://127.0.0.1:6379"
            )
        if self.tls_cert is None and not self.insecure:
            for name, address in (("POMELO_REST", self.rest), ("POMELO_GRPC", self.grpc)):
                if address and not is_loopback(split_address(address)[0]):
                    raise ValueError(
                        f"{name}: {address} is open to other machines without TLS. Set POMELO_TLS_CERT and "
                        "POMELO_TLS_KEY, or POMELO_INSECURE=1 behind a proxy that has it"
                    )
        return self

    def provider(self, name: str) -> ProviderSettings:
        """What the operator gives for the provider of that name, by variable or else by file.

        Raises:
            SettingsError: a variable has a wrong value.
        """
        given = self.providers.get(name, ProviderSettings()).model_dump()
        named = {kind: provider_variable(name, kind) for kind in ProviderSettings.model_fields}
        found = {kind: self.variables[named[kind]] for kind in named if named[kind] in self.variables}
        try:
            return ProviderSettings.model_validate(given | found)
        except ValidationError as error:
            raise SettingsError(_line(error, named)) from None

    def check_providers(self, known: Collection[str]) -> None:
        """Refuses settings of providers that there are not.

        Raises:
            SettingsError: there are some.
        """
        for name in self.providers:
            if name not in known:
                raise SettingsError(f"No provider is named {name}{_meant(name, known)}")

    def rest_address(self) -> tuple[str, int]:
        """Host and port of REST.

        Raises:
            SettingsError: REST is off.
        """
        if not self.rest:
            raise SettingsError("POMELO_REST is empty: REST is off")
        return split_address(self.rest)

    def store_url(self) -> str:
        """The store, as `pomelo.stores.open_store` takes it."""
        return f"sqlite:{self.database}" if self.store == "sqlite:" else self.store

    def archive_url(self) -> str:
        """Where usage goes from the store, as `pomelo.stores.open_store` takes it; SQLite needs none."""
        if self.store == "sqlite:":
            return ""
        return self.archive or f"sqlite:{self.data / 'usage.db'}"

    @property
    def database(self) -> Path:
        """The file of the built-in store."""
        return self.data / "pomelo.db"

    @property
    def admin_socket(self) -> Path:
        """Where the operator's service listens."""
        return self.data / "admin.sock"

    @property
    def key_file(self) -> Path:
        """Where the development key is kept."""
        return self.data / "test-key"

    def root_secret(self) -> bytes:
        """The root secret; made and kept (mode 0600) in the data folder when there is none. Makes the folder.

        The first one that is used is the only one that the folder takes from then on.

        Raises:
            SettingsError: the folder or the file can't be used, or the secret is another one.
        """
        try:
            self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_private()
            if self.secret:
                self._check(self.secret.encode(), "POMELO_SECRET")
                return self.secret.encode()
            path = self.data / "secret"
            if not path.exists():
                if self.database.exists():
                    raise SettingsError(f"{path} is missing. Restore it; without it no key is valid any more")
                write_private(path, secrets.token_hex(32), replace=False)
            if path.stat().st_mode & 0o077:
                raise SettingsError(f"{path} can be read by others. Run: chmod 600 {path}")
            secret = path.read_text().strip()
            if len(secret) < _SECRET_LENGTH:
                raise SettingsError(f"{path} is damaged. Restore it; without it no key is valid any more")
            self._check(secret.encode(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"POMELO_DATA: {self.data} can't be used: {_reason(error)}") from error
        return secret.encode()

    def _make_private(self) -> None:
        """Denies other users access to the data folder, where they could read or replace files.

        Raises:
            SettingsError: another user owns it, or it is not a Pomelo data folder; OSError: chmod
                failed.
        """
        found = self.data.stat()
        mode = stat.S_IMODE(found.st_mode)
        own = f"Set POMELO_DATA to a folder of its own, such as {self.data / 'pomelo'}"
        if found.st_uid != os.geteuid():
            raise SettingsError(
                f"POMELO_DATA: {self.data} belongs to another user (uid {found.st_uid}). {own}, "
                f"or run: chown -R {os.geteuid()} {self.data}"
            )
        if not mode & 0o077:
            return
        names = {path.name for path in self.data.iterdir()} - {"lost+found"}
        if names and names.isdisjoint(_OURS):
            raise SettingsError(
                f"POMELO_DATA: {self.data} is open to other users (mode {mode:04o}) and has files of others. "
                f"{own}, or run: chmod 700 {self.data}"
            )
        self.data.chmod(0o700)
        if stat.S_IMODE(self.data.stat().st_mode) & 0o077:
            raise SettingsError(
                f"POMELO_DATA: {self.data} is open to other users, and its file system can't close it. "
                "Set POMELO_DATA to a folder on another one"
            )
        log.warning("POMELO_DATA: %s was open to other users (mode %04o) and is closed now", self.data, mode)

    def shared_secret(self) -> bytes | None:
        """The root secret for a gateway's proofs, None if this host has none. Creates nothing.

        Raises:
            SettingsError: the data folder contains one that can't be used.
        """
        if self.secret:
            return self.secret.encode()
        try:
            kept = (self.data / "secret").exists()
        except OSError:  # another user's data folder
            kept = False
        return self.root_secret() if kept else None

    def _check(self, secret: bytes, named: str) -> None:
        """Refuses a secret under which the folder's keys are worth nothing.

        Raises:
            SettingsError: it is another one; OSError: the check value can't be read or kept.
        """
        path = self.data / "secret-check"
        value = hmac.new(secret, _CHECK, hashlib.sha256).hexdigest()
        if not path.exists():
            write_private(path, value, replace=False)
        if not hmac.compare_digest(path.read_bytes().strip(), value.encode()):
            raise SettingsError(
                f"{named} is not the secret that the keys in {self.data} were made under. Restore that one, "
                "or set POMELO_DATA to another folder"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address of `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load(config: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings: `config` (or POMELO_CONFIG, or pomelo.toml where it exists), overridden by `environ`.

    An empty variable counts as absent, but for POMELO_REST and POMELO_GRPC, which it turns off.

    Raises:
        SettingsError: a file that is named but can't be read; an unknown or wrong name or value.
    """
    values = _from_file(_config(config, environ)) | _from_variables(environ)
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError(_line(error)) from None


def with_workers(settings: Settings, workers: int) -> Settings:
    """The same settings with another number of workers.

    Raises:
        SettingsError: there can't be so many.
    """
    try:
        return Settings.model_validate({**settings.model_dump(), "workers": workers})
    except ValidationError as error:
        raise SettingsError(_line(error)) from None


def variable(name: str) -> str:
    """The variable of a setting: POMELO_REST for rest."""
    return PREFIX + name.upper()


def provider_variable(provider: str, kind: str) -> str:
    """The variable of a provider's setting: OPENAI_API_KEY for the api_key of openai."""
    return f"{provider}_{kind}".upper().replace("-", "_")


def _config(config: Path | None, environ: Mapping[str, str]) -> Path | None:
    named = config or (Path(given) if (given := environ.get("POMELO_CONFIG")) else None)
    if named is None:
        return CONFIG if CONFIG.exists() else None
    if not named.is_file():
        raise SettingsError(f"{named}: there is no such file")
    return named


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} can't be read: {_reason(error)}") from None
    known = Settings.model_fields.keys() - _NOT_WRITTEN
    for name in values:
        if name not in known and not _CREDENTIAL.fullmatch(name):
            raise SettingsError(f"{path}: unknown key {name!r}{_meant(name, known)}")
    for name in ("data", "catalog", "tls_cert", "tls_key", "tls_client_ca"):
        if isinstance(values.get(name), str) and values[name]:
            values[name] = path.parent / values[name]
    return values


def _from_variables(environ: Mapping[str, str]) -> dict[str, Any]:
    names = Settings.model_fields.keys() - _NO_VARIABLES
    known = {variable(name) for name in names} | NOT_SETTINGS
    for name in environ:
        if name.startswith(PREFIX) and name not in known:
            raise SettingsError(f"Unknown variable {name}{_meant(name, known)}")
    off = {"POMELO_REST", "POMELO_GRPC"}
    given = {name: value for name, value in environ.items() if value or name in off}
    values: dict[str, Any] = {name: given[variable(name)] for name in names if variable(name) in given}
    values["variables"] = {
        name: value
        for name, value in given.items()
        if not name.startswith(PREFIX) and _CREDENTIAL.fullmatch(name.lower())
    }
    return values


def _meant(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f". Did you mean {close[0]}?" if close else ""


def _line(error: ValidationError, named: Mapping[str, str] | None = None) -> str:
    """The first thing that is wrong, without its value; `named` gives the variables of the fields."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such key"
    if not first["loc"]:
        return message
    name = str(first["loc"][0])
    if named is not None:
        name = named.get(name, name)
    elif name == "providers":
        name = "_".join(map(str, first["loc"][1:]))
    elif name == "plans":
        name = ".".join(str(part) for part in first["loc"] if part != "[key]")
    elif name in Settings.model_fields:
        name = variable(name)
    return f"{name}: {message}"


def _reason(error: Exception) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else "it is no text"


def write_private(path: Path, text: str, *, replace: bool) -> None:
    """Writes a file of mode 0600 that is whole or absent; without `replace`, one that is there stays.

    Raises:
        OSError: it can't be written.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        if replace:
            Path(temporary).replace(path)
        else:
            with suppress(FileExistsError):
                os.link(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
