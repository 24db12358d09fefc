"""The operator's settings: `pomelo.toml`, overridden by environment variables, validated once at start."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from pomelo import secrets
from pomelo.network.addresses import is_loopback, split_address
from pomelo.settings import types

PREFIX = "POMELO_"
CONFIG = Path("pomelo.toml")
"""Read from the working directory when neither --config nor POMELO_CONFIG names a file."""

_CLIENT_VARIABLES = frozenset({"POMELO_CONFIG", "POMELO_KEY", "POMELO_TARGET"})
"""Variables that are not settings: the command line and `pomelo.client` read them themselves."""

_SERVERS = frozenset({"POMELO_REST", "POMELO_GRPC", "POMELO_ADMIN"})
"""Variables that turn a server off if they are empty."""

_PROVIDER_SETTING = re.compile(r"([a-z][a-z0-9_-]*)_(api_key|base_url)")
"""The settings of a provider. Their variables have the vendor's own names, which its own tools read, too."""

_MIB = 1024 * 1024
T = TypeVar("T")


class SettingsError(Exception):
    """The settings can't be used. The message names the wrong setting, for a catalogue each wrong row."""


class ProviderSettings(BaseModel):
    """The operator's settings of one provider, `[providers.NAME]`. An empty `base_url` stands for the
    vendor's own. Further keys are those that the provider declares."""

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)

    api_key: types.ApiKey = Field(default=None, repr=False)
    base_url: types.BaseUrl = ""

    def further(self, name: str, schema: type[BaseModel] | None) -> BaseModel | None:
        """Returns the further settings as an instance of `schema`; None if the provider `name` declares none.

        Raises:
            SettingsError: a key is unknown, or has a wrong value.
        """
        given = self.model_extra or {}
        if schema is None:
            for key in given:
                raise SettingsError(f"providers.{name}.{key}: there is no such key")
            return None
        try:
            return schema.model_validate(given)
        except ValidationError as error:
            raise SettingsError(f"providers.{name}.{_first_error(error, {})}") from None


class Settings(BaseModel):
    """Every setting. Creating one reads neither files nor variables; `load` does.

    An address is `host:port`, empty to turn the server off, with port 0 for any free one. Sizes are in bytes
    and may be written as 8MiB, times are in seconds. Relative paths are relative to the working directory;
    those of a file, to the file's folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    rest: types.Address = "127.0.0.1:8080"
    grpc: types.Address = "127.0.0.1:50051"
    admin: types.Address = "127.0.0.1:9090"
    """The address of metrics and health, for the operator only; it has neither keys nor TLS."""
    data: types.Folder = Path(".pomelo")
    store: types.Store = Field(default="sqlite:", repr=False)
    archive: types.Archive = Field(default="", repr=False)
    """The database that usage records move to from Redis; empty: a file in the data folder."""
    media: types.Bucket = ""
    """The bucket of images and audio, which several machines share; empty: the data folder."""
    workers: int = Field(default=1, ge=1, le=64)
    """Number of serving processes; more than 1 needs a store that they can share."""
    public_url: types.BaseUrl = ""
    """The URL at which callers reach REST; empty: its address."""
    page: bool = True
    """Whether REST serves the page for developers at `/`."""
    cors_origins: types.Origins = ()
    """Origins whose pages may call REST from a browser, such as https://app.example; `*` alone: all."""
    secret: types.Secret = Field(default="", repr=False)
    """The root secret, from which key peppers and link signatures derive; empty: that of the data folder."""
    secret_previous: types.Secrets = Field(default=(), repr=False)
    """Root secrets that are accepted beside `secret` while it is rotated."""
    tls_cert: types.File = None
    tls_key: types.File = None
    tls_client_ca: types.File = None
    insecure: bool = False
    catalog: types.File = None
    """The operator's catalogue, whose entries are added to the built-in ones or replace them."""
    delivery_origins: types.Urls = ()
    """Private origins that vendors' files may be downloaded from, such as http://10.0.0.5:9000."""
    trusted_proxies: types.Networks = ()
    """Addresses and networks of reverse proxies, such as 10.0.0.0/8. One caller's fault does not close their
    gRPC connections; for REST see `idle_timeout`. Their X-Forwarded-For has the address of the caller."""
    providers: Mapping[str, ProviderSettings] = Field(default_factory=dict, repr=False)
    """By name; `acme_api_key` and `acme_base_url` are short forms for the provider acme."""
    variables: Mapping[str, str] = Field(default_factory=dict, repr=False)
    """Environment variables that may be a provider's, such as ACME_API_KEY; they override `providers`."""
    json_limit: types.MessageSize = ByteSize(8 * _MIB)
    upload_limit: Annotated[types.Size, Field(gt=0)] = ByteSize(50 * _MIB)
    inline_limit: types.MessageSize = ByteSize(4 * _MIB)
    upstream_connections: int = Field(default=256, ge=1, le=65536)
    """Concurrent connections of one process to each vendor's host."""
    media_limit: Annotated[types.Size, Field(gt=0)] = ByteSize(10 * 1024 * _MIB)
    """Maximum bytes of all media; `media_account_limit` applies to one account and mode."""
    media_account_limit: Annotated[types.Size, Field(gt=0)] = ByteSize(1024 * _MIB)
    disk_reserve: Annotated[types.Size, Field(ge=0)] | None = None
    """Disk bytes that media leave free for the ledger; None: 512 MiB, or a tenth of a smaller disk."""
    max_calls: int = Field(default=2000, ge=1, le=1_000_000)
    """Concurrent calls of both protocols; one account has at most half of them."""
    max_connections: int = Field(default=4096, ge=8, le=1_000_000)
    """REST connections of all callers together, in each process."""
    idle_timeout: float | None = Field(default=None, ge=1, le=86_400)
    """Seconds that a REST connection may be idle; None: 75, and 650 from `trusted_proxies`."""
    plans: Mapping[types.PlanName, types.PlanSettings] = Field(default_factory=dict)
    """Plans that are added to the built-in ones or replace those of the same name."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] | None = None
    """None: text on a terminal, otherwise JSON."""
    alert_url: types.AlertUrls = Field(default=(), repr=False)
    """Receivers of alerts: https, or http on this machine."""
    alert_secret: types.AlertSecrets = Field(default=(), repr=False)
    """Secrets that alerts are signed with; empty: derived from the root secret."""
    alert_balance: float = Field(default=0.2, ge=0, le=1)
    """The share of its last grant below which the balance of an account is reported."""
    grace: float = Field(default=10.0, ge=0, le=3600)
    """Seconds that running tasks have to finish when the server shuts down."""
    drain_delay: float = Field(default=0.0, ge=0, le=600)
    """Seconds for which a server that shuts down still accepts calls while its health checks fail already."""

    @model_validator(mode="before")
    @classmethod
    def _collect_providers(cls, values: dict[str, Any]) -> dict[str, Any]:
        providers = values.get("providers", {})
        if not isinstance(providers, Mapping):
            return values  # which is refused
        rest, providers = dict(values), dict(providers)
        for name in values:
            if name not in cls.model_fields and (match := _PROVIDER_SETTING.fullmatch(name)):
                provider, field = match.groups()
                own = providers.get(provider, {})
                if isinstance(own, Mapping):
                    providers[provider] = {**own, field: rest.pop(name)}
        return {**rest, "providers": providers}

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("POMELO_TLS_CERT and POMELO_TLS_KEY go together: set both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("POMELO_TLS_CLIENT_CA needs POMELO_TLS_CERT and POMELO_TLS_KEY")
        if self.workers > 1 and self.uses_sqlite:
            raise ValueError(
                "POMELO_WORKERS: SQLite serves one process. For more set POMELO_STORE to a Redis server, "
                "such as redis://127.0.0.1:6379"
            )
        if self.tls_cert is None and not self.insecure:
            for name, address in (("POMELO_REST", self.rest), ("POMELO_GRPC", self.grpc)):
                if address and not is_loopback(split_address(address)[0]):
                    raise ValueError(
                        f"{name}: {address} is open to other machines without TLS. Set POMELO_TLS_CERT and "
                        "POMELO_TLS_KEY, or POMELO_INSECURE=1 behind a proxy that speaks TLS"
                    )
        if self.admin and not self.insecure and not is_loopback(split_address(self.admin)[0]):
            raise ValueError(
                f"POMELO_ADMIN: {self.admin} shows metrics to other machines, without a key and without TLS. "
                "Use a loopback address, or set POMELO_INSECURE=1 in a network of your own"
            )
        return self

    def provider(self, name: str) -> ProviderSettings:
        """Returns the settings of the provider of that name; variables override the file.

        Raises:
            SettingsError: a variable has a wrong value.
        """
        values = self.providers.get(name, ProviderSettings()).model_dump()
        names = {field: provider_variable(name, field) for field in ProviderSettings.model_fields}
        overrides = {field: self.variables[names[field]] for field in names if names[field] in self.variables}
        try:
            return ProviderSettings.model_validate(values | overrides)
        except ValidationError as error:
            raise SettingsError(_first_error(error, names)) from None

    def check_providers(self, known: Collection[str]) -> None:
        """Refuses settings of unknown providers.

        Raises:
            SettingsError: a provider is not in `known`.
        """
        for name in self.providers:
            if name not in known:
                raise SettingsError(f"No provider is named {name}{_suggestion(name, known)}")

    def rest_address(self) -> tuple[str, int]:
        """Returns host and port of REST.

        Raises:
            SettingsError: REST is off.
        """
        if not self.rest:
            raise SettingsError("POMELO_REST is empty: REST is off")
        return split_address(self.rest)

    def store_url(self) -> str:
        """Returns the URL of the store, with the path of the file for SQLite."""
        return f"sqlite:{self.database}" if self.uses_sqlite else self.store

    def archive_url(self) -> str:
        """Returns the URL of the usage archive; empty for SQLite, which needs none."""
        return "" if self.uses_sqlite else self.archive or f"sqlite:{self.data / secrets.ARCHIVE}"

    @property
    def uses_sqlite(self) -> bool:
        """Whether the store is SQLite, which serves this machine alone."""
        return self.store == "sqlite:"

    @property
    def database(self) -> Path:
        """The file of the SQLite store."""
        return self.data / secrets.DATABASE

    @property
    def admin_socket(self) -> Path:
        """The Unix socket of the operator's service."""
        return self.data / "admin.sock"

    @property
    def key_file(self) -> Path:
        """The file of the development key."""
        return self.data / "test-key"

    def root_secret(self) -> bytes:
        """Returns the root secret. Creates the data folder, and the secret if neither exists.

        Raises:
            SettingsError: the folder or the secret can't be used.
        """
        return self._use(secrets.load_root_secret)

    def shared_secret(self) -> bytes | None:
        """Returns the root secret if this host has one, else None. Creates nothing.

        Raises:
            SettingsError: the secret of the data folder can't be used.
        """
        return self._use(secrets.find_root_secret)

    def check_secret(self) -> None:
        """Checks the root secret. Creates nothing.

        Raises:
            SettingsError: it can't be used.
        """
        self._use(secrets.check_root_secret)

    def previous_secrets(self) -> tuple[bytes, ...]:
        """Returns the root secrets that are accepted beside the current one."""
        return tuple([secret.encode() for secret in self.secret_previous])

    def _use(self, read: Callable[[Path, str, Sequence[bytes]], T]) -> T:
        try:
            return read(self.data, self.secret, self.previous_secrets())
        except secrets.SecretError as error:
            raise SettingsError(str(error)) from error


def load(
    config: Path | None = None, environ: Mapping[str, str] = os.environ, *, workers: int | None = None
) -> Settings:
    """Returns the settings of a file, overridden by `environ`, both overridden by `workers`.

    The file is `config`, POMELO_CONFIG, or pomelo.toml if it exists. An empty variable counts as absent,
    except for POMELO_REST, POMELO_GRPC and POMELO_ADMIN, which it turns off.

    Raises:
        SettingsError: a named file can't be read; a name is unknown; a value is wrong.
    """
    values = _from_file(find_file(config, environ)) | _from_variables(environ)
    if workers is not None:
        values["workers"] = workers
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError(_first_error(error)) from None


def variable(name: str) -> str:
    """Returns the variable of a setting: POMELO_REST for rest."""
    return PREFIX + name.upper()


def provider_variable(provider: str, field: str) -> str:
    """Returns the variable of a provider's setting: OPENAI_API_KEY for the api_key of openai."""
    return f"{provider}_{field}".upper().replace("-", "_")


def find_file(config: Path | None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Returns the file that `load` reads, None without one.

    Raises:
        SettingsError: a named file does not exist, or is a folder, a device or a pipe.
    """
    path = config or (Path(name) if (name := environ.get("POMELO_CONFIG")) else None)
    if path is not None and not path.is_file():
        # A pipe is refused, too: a reload reads the file again.
        problem = "this is not a regular file" if path.exists() else "there is no such file"
        raise SettingsError(f"{path}: {problem}")
    return path or (CONFIG if CONFIG.exists() else None)


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text("utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} can't be read: {secrets.describe_file_error(error)}") from None
    known = Settings.model_fields.keys() - {"variables"}
    for name in values:
        if name not in known and not _PROVIDER_SETTING.fullmatch(name):
            raise SettingsError(f"{path}: unknown key {name!r}{_suggestion(name, known)}")
    for name in ("data", "catalog", "tls_cert", "tls_key", "tls_client_ca"):
        if isinstance(values.get(name), str) and values[name]:
            values[name] = path.parent / values[name]
    return values


def _from_variables(environ: Mapping[str, str]) -> dict[str, Any]:
    names = Settings.model_fields.keys() - {"plans", "providers", "variables"}  # which have none of their own
    known = {variable(name) for name in names} | _CLIENT_VARIABLES
    for name in environ:
        if name.startswith(PREFIX) and name not in known:
            raise SettingsError(f"Unknown variable {name}{_suggestion(name, known)}")
    given = {k: value for k, value in environ.items() if value or k in _SERVERS}
    values: dict[str, Any] = {name: given[variable(name)] for name in names if variable(name) in given}
    values["variables"] = {
        name: value for name, value in given.items() if _PROVIDER_SETTING.fullmatch(name.lower())
    }
    return values


def _suggestion(name: str, known: Collection[str]) -> str:
    key = name.lower().removeprefix("pomelo_")  # for a variable in a file
    close = [key] if key in known else difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f". Did you mean {close[0]}?" if close else ". Remove it, or correct its name"


def _first_error(error: ValidationError, variables: Mapping[str, str] | None = None) -> str:
    """Describes the first error, without the value; `variables` are those of the fields."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    message = types.describe_refusal(first["type"], first["msg"])
    if not first["loc"]:
        return message
    name = str(first["loc"][0])
    if variables is not None:
        name = variables.get(name, name)
    elif name == "providers":
        name = "_".join(map(str, first["loc"][1:]))
    elif name == "plans":
        name = ".".join(str(part) for part in first["loc"] if part != "[key]")
    elif name in Settings.model_fields:
        name = variable(name)
    return f"{name}: {message}"
