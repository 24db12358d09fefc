"""`pomelo doctor`: reports what is configured, reachable and missing."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

import pomelo
from pomelo.cli.findings import Finding, report
from pomelo.cli.server_checks import TIMEOUT, check_grpc, check_rest, get_status
from pomelo.cli.store_checks import check_store
from pomelo.cli.terminal import Config, Json, explain, format_time

if TYPE_CHECKING:
    from datetime import date
    from pathlib import Path

    from pomelo.gen.admin.v1.admin_service_pb2 import GetServerResponse
    from pomelo.providers import Credentials
    from pomelo.providers.registry import Entry, Registry
    from pomelo.settings import Settings, SettingsError


def doctor(
    config: Config = None,
    as_json: Json = False,
    fleet: Annotated[
        bool, typer.Option("--fleet", help="Report whether all machines share the required settings.")
    ] = False,
) -> None:
    """Report what is configured, reachable and missing.

    Status 1 if something is broken.
    """
    from pomelo.cli.fleet import check_fleet

    logging.getLogger("pomelo.settings").setLevel(logging.ERROR)  # the findings include its warnings
    report(check_fleet(config) if fleet else _check(config), as_json)


def _check(config: Any) -> Iterator[Finding]:
    yield _program()
    yield from _pyav()
    from pomelo.settings import CONFIG, SettingsError, load

    try:
        settings = load(config)
    except SettingsError as error:
        yield Finding("settings", "broken", str(error))
        return
    source = config or (CONFIG if CONFIG.exists() else None)
    yield Finding("settings", "ok", f"{source} and variables" if source else "variables and defaults")
    yield check_data(settings)
    from pomelo.cli.client import is_served
    from pomelo.cli.fleet import check_bucket
    from pomelo.configuration import find_providers

    served = is_served(settings.admin_socket)
    registry: Registry | SettingsError
    try:
        registry = find_providers(settings)
    except SettingsError as error:
        registry = error
    server: GetServerResponse | None = None
    if served:
        server, finding = _server(settings)
        yield finding
    yield from check_store(settings, served, registry)
    if settings.media:
        yield asyncio.run(check_bucket(settings))
    yield check_grpc(settings, served)
    yield check_rest(settings, served)
    yield from _links(settings)
    yield from _certificate(settings)
    yield from _providers(settings, registry, server)


def _program() -> Finding:
    import sqlite3

    import aiohttp.http_parser as parser

    name = f"pomelo {pomelo.__version__}, Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}"
    if sqlite3.sqlite_version_info < (3, 37):
        return Finding("program", "broken", f"{name}: SQLite 3.37 or later is required")
    if parser.HttpRequestParser is parser.HttpRequestParserPy:
        return Finding("program", "broken", f"{name}: aiohttp has no C parser. Reinstall it from a wheel")
    return Finding("program", "ok", name)


def _pyav() -> Iterator[Finding]:
    """Reports what does not work without PyAV, if it is not installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        yield Finding(
            "PyAV",
            "off",
            "not installed: test keys get no MP3, Opus, JPEG or WebP, and the maximum cost of audio input is "
            f"reserved, since it can't be measured. Run: {pomelo.install_command('sandbox')}",
        )


def check_data(settings: Settings, *, exposed: str = "broken") -> Finding:
    """Checks the data folder. `exposed` is the state if other users can read it."""
    try:
        return _check_folder(settings, settings.data.absolute(), exposed)
    except OSError as error:  # it is in a folder of another user
        return Finding("data", "broken", explain(error))


def _check_folder(settings: Settings, folder: Path, exposed: str) -> Finding:
    if not folder.exists():
        return Finding("data", "off", f"{folder} does not exist yet. Create it with: pomelo serve")
    for path in (folder, folder / "media"):  # the latter may be a volume of its own
        is_usable = path.is_dir() and os.access(path, os.R_OK | os.W_OK | os.X_OK)
        if not is_usable and (path == folder or path.exists()):
            return Finding("data", "broken", f"{path} is not a folder that this user can write to")
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        return Finding("data", exposed, f"{folder} is open to other users. Run: chmod 700 {folder}")
    for name in ("secret", "secret-check", "test-key", "pomelo.db"):
        path = folder / name
        if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
            return Finding("data", exposed, f"other users can read {path}. Run: chmod 600 {path}")
    if not settings.secret and not (folder / "secret").exists() and settings.database.exists():
        return Finding("data", "broken", f"{folder / 'secret'} is missing: no key is valid without it")
    return _check_space(settings, folder) or Finding("data", "ok", str(folder))


def _check_space(settings: Settings, folder: Path) -> Finding | None:
    from pomelo.media.quota import missing_space
    from pomelo.stores.archive import archive_file

    archive = archive_file(settings.archive_url())
    for path in (folder, settings.database.resolve().parent, *([archive.parent] if archive else [])):
        if path.exists() and not os.statvfs(path).f_bavail:
            return Finding("data", "broken", f"no space is left on the disk of {path}. Free some")
    media = folder / "media"
    if reason := missing_space(media if media.exists() else folder, 0, settings.disk_reserve):
        return Finding("data", "warning", f"no media can be stored: {reason}")
    return None


def _server(settings: Settings) -> tuple[GetServerResponse | None, Finding]:
    """What the running server reports of itself; None if it can't be asked."""
    from pomelo.cli.operator import call_operator
    from pomelo.gen.admin.v1.admin_service_pb2 import GetServerRequest

    try:
        found = call_operator(settings, lambda operator: operator.get_server(GetServerRequest()), TIMEOUT)
    except Exception as error:
        line = explain(error)
        if getattr(error, "code", "") == "not_found":
            line = "it runs an earlier version of Pomelo: restart it"
            return None, Finding("server", "warning", line)
        return None, Finding("server", "broken", line)
    detail = f"pomelo {found.version}, since {format_time(found, 'start_time')}"
    if found.version != pomelo.__version__:
        detail += f", but this command is of {pomelo.__version__}: restart the server"
        return found, Finding("server", "warning", detail)
    return found, Finding("server", "ok", detail)


def _links(settings: Settings) -> Iterator[Finding]:
    """Reports links to media that callers can't use."""
    from pomelo.network.addresses import is_every_address, split_address

    if settings.rest and not settings.public_url and is_every_address(split_address(settings.rest)[0]):
        scheme = "https" if settings.tls_cert else "http"
        yield Finding(
            "links",
            "warning",
            f"links to media begin with {scheme}://{settings.rest}, which only this machine can reach. Set "
            "POMELO_PUBLIC_URL",
        )


def _certificate(settings: Settings) -> Iterator[Finding]:
    """Whether a start or a reload can use the files of the certificate, and until when."""
    from pomelo.configuration import find_certificate
    from pomelo.settings import SettingsError

    try:
        certificate = find_certificate(settings)
    except SettingsError as error:
        yield Finding("TLS", "broken", str(error))
        return
    if certificate is not None and certificate.ends is not None:
        assert settings.tls_cert is not None
        yield describe_certificate(settings.tls_cert, certificate.ends)


def describe_certificate(path: Path, ends: float) -> Finding:
    """Reports when a certificate ends; `ends` is Unix time."""
    from datetime import UTC, datetime

    from pomelo.network.tls import EXPIRY_NOTICE

    end, now = datetime.fromtimestamp(ends, UTC), datetime.now(UTC)
    if end <= now:
        return Finding("TLS", "broken", f"{path} ended on {end:%Y-%m-%d}")
    soon = end - now < EXPIRY_NOTICE
    return Finding("TLS", "warning" if soon else "ok", f"{path} is valid until {end:%Y-%m-%d}")


def _providers(
    settings: Settings, registry: Registry | SettingsError, server: GetServerResponse | None
) -> Iterator[Finding]:
    from pomelo.configuration import credentials
    from pomelo.protobuf.times import today_utc
    from pomelo.settings import SettingsError

    try:
        if isinstance(registry, SettingsError):
            raise registry
        configured = credentials(settings, registry)
    except SettingsError as error:
        yield Finding("providers", "broken", str(error))
        return
    yield from _retirements(registry, configured, today_utc())
    for entry in registry.entries.values():
        if broken := registry.broken.get(entry.name) or _opening_error(entry, configured):
            yield Finding(entry.name, "broken", f"{broken}. Its models are not available")
        elif not entry.account:  # a provider with the key of another is covered by that one
            finding = _provider(entry, configured)
            yield finding if server is None else _as_served(finding, entry.name in server.providers)


def _opening_error(entry: Entry, configured: Mapping[str, Credentials]) -> str:
    """Why a plug-in can't be opened; empty if it can be."""
    if not entry.is_plugin:
        return ""
    from pomelo.providers import open_providers

    async def open_it() -> None:
        async with open_providers([entry], configured):
            pass

    try:
        asyncio.run(open_it())
    except ValueError as error:
        return str(error)
    return ""


def _as_served(finding: Finding, has_it: bool) -> Finding:
    """A finding about a provider in the settings of this command, with what the running server has."""
    if has_it and finding.state == "off":
        return finding._replace(state="ok", detail="configured in the running server, not for this command")
    if not has_it and finding.state == "ok":
        detail = f"{finding.detail}, but the running server was started without it: restart it"
        return finding._replace(state="warning", detail=detail)
    return finding


def _retirements(registry: Registry, configured: Mapping[str, Credentials], today: date) -> Iterator[Finding]:
    """Reports models, routes, and default voices in use that end within 60 days or have ended."""
    from pomelo.catalog.catalog import RETIREMENT_NOTICE
    from pomelo.catalog.retirement import notices
    from pomelo.providers.elevenlabs.voices import LAST_DAY

    retirements = list(notices(registry.catalog, today))
    if retirements:
        state = "broken" if any(notice.is_past for notice in retirements) else "warning"
        yield Finding("retirement", state, "\n".join(map(str, retirements)))
    models = registry.catalog.models.values()
    has_voices = any("voices" in route.options for model in models for route in model.routes)
    if configured["elevenlabs"].api_key and not has_voices and today >= LAST_DAY - RETIREMENT_NOTICE:
        verb = "ended" if today > LAST_DAY else "end"
        yield Finding(
            "voices",
            "warning",  # not broken: the account may have its own voices of these names
            f"ElevenLabs' default voices, such as adam, {verb} on {LAST_DAY}. Set the names that callers use "
            "in [voices] of POMELO_CATALOG",
        )


def _provider(entry: Entry, configured: Mapping[str, Credentials]) -> Finding:
    from pomelo.network.addresses import without_login
    from pomelo.settings import provider_variable

    name, credentials = entry.name, entry.located(configured)
    key_variable = provider_variable(name, "api_key")
    if not credentials.base_url:
        return Finding(name, "off", f"{provider_variable(name, 'base_url')} is not set")
    key, base_url, probe = credentials.api_key, credentials.base_url, entry.probe
    if not key and entry.key_needed:
        return Finding(name, "off", f"{key_variable} is not set: its models work with test keys only")
    if probe is None:
        return Finding(name, "ok", f"{key_variable} is set; the provider has no free request to check it")
    shown = without_login(base_url)
    try:
        headers = {**probe.headers, probe.header: probe.prefix + key} if key else dict(probe.headers)
        status = get_status(base_url.rstrip("/") + probe.path, headers)
    except OSError:
        return Finding(name, "broken", f"{shown} can't be reached")
    if status in (401, 403):
        return Finding(name, "broken", f"{key_variable} is refused ({status})")
    if status >= 400:
        return Finding(name, "broken", f"{shown} answers {status}")
    return Finding(name, "ok", f"{shown} takes the key" if key else f"{shown} answers")
