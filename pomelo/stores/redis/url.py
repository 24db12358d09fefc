"""Parses the URL of a Redis store, connects, and checks that the server can be trusted with credits."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from redis import exceptions as errors
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff

from pomelo.network.tls import default_context, load_certificate
from pomelo.stores.base import StoreError
from pomelo.stores.redis.client import Cluster, SingleServer
from pomelo.stores.redis.connection import NotSentError, Timing, is_closed_transport
from pomelo.stores.redis.link import Link, Login, open_link

SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")

_FORMS = (
    "redis://[USER:PASSWORD@]HOST[:PORT][/DB], rediss://… with TLS, redis+cluster://HOST:PORT[,HOST:PORT…], "
    "or redis+sentinel://HOST:PORT[,HOST:PORT…]/SERVICE"
)
_TLS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_MIN_REDIS = (6, 2)
_FAILURES = (errors.RedisError, errors.RedisClusterException, OSError, ssl.SSLError)


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """A parsed URL. `topology` is "", "cluster" or "sentinel", `service` the name of the primary for
    Sentinels. `durable`: the server must write its data to disk."""

    topology: str
    hosts: tuple[tuple[str, int], ...]
    service: str = ""
    db: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: dict[str, Any] = field(default_factory=dict)
    durable: bool = True


def parse_url(url: str) -> ServerUrl:
    """Parses a URL.

    Raises:
        StoreError: it has none of the documented forms. The message contains no password.
    """
    with suppress(ValueError):  # its message may contain the password
        return _parse(url)
    raise StoreError(
        f"The URL of the store can't be read. Use {_FORMS}; ?persistence=none allows a server without AOF"
    )


def _parse(url: str) -> ServerUrl:
    """As `parse_url`.

    Raises:
        ValueError: it has none of the documented forms.
    """
    scheme, _, rest = url.partition("://")
    base, _, topology = scheme.partition("+")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    parts = urlsplit("//authority" + rest[len(authority) :])  # it refuses several addresses in brackets
    login, _, addresses = authority.rpartition("@")
    user, _, password = login.partition(":")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    path = parts.path.strip("/")
    persistence = options.pop("persistence", "aof")
    service, _, db = path.partition("/") if topology == "sentinel" else ("", "", path)
    hosts = tuple([_host(text, 26379 if topology == "sentinel" else 6379) for text in addresses.split(",")])
    if (
        scheme not in SCHEMES
        or (topology == "sentinel") != bool(service)
        or (topology == "" and len(hosts) != 1)
        or (topology == "cluster" and path != "")
        or persistence not in ("aof", "none")
        or set(options) - set(_TLS if base == "rediss" else ())
    ):
        raise ValueError(scheme)
    return ServerUrl(
        topology=topology,
        hosts=hosts,
        service=unquote(service),
        db=int(db or "0"),
        user=unquote(user) or None,
        password=unquote(password) or None,
        tls={"ssl": True, **options} if base == "rediss" else {},
        durable=persistence == "aof",
    )


def _host(text: str, port: int) -> tuple[str, int]:
    parts = urlsplit("//" + text)
    if not parts.hostname:
        raise ValueError(text)
    return parts.hostname, parts.port or port


async def check_server(url: ServerUrl, timing: Timing) -> None:
    """Checks the servers as `connect` does, and whether they can be written, as far as that changes nothing.

    Raises:
        StoreError: they can't be reached or used.
    """
    client = await connect(url, timing)
    try:
        # It is refused as any other write, and writes nothing: a key of this name never exists.
        await client.execute_command("SET", "pomelo:check", "", "XX")
    except _FAILURES as error:
        raise StoreError(f"The Redis server at {_names(url)} can't be written: {error}") from error
    finally:
        await client.aclose()


async def connect(url: ServerUrl, timing: Timing, patience: float | None = None) -> SingleServer | Cluster:
    """Connects to the servers, and checks their version, role and settings. A busy server has `patience`
    seconds to answer (None: the usual timeout).

    Raises:
        StoreError: they can't be reached or used.
    """
    client: SingleServer | Cluster | None = None
    try:
        client = _client(url, timing)
        for info in await _read_info(client, timing.timeout if patience is None else patience):
            _check(url, info)
    except BaseException as error:
        if client is not None:
            await client.aclose()
        if isinstance(error, StoreError) or not (isinstance(error, _FAILURES) or is_closed_transport(error)):
            raise
        reason = error.__cause__ if isinstance(error, NotSentError) else None
        raise _unusable(_names(url), reason or error) from error
    return client


async def _read_info(client: SingleServer | Cluster, seconds: float) -> list[dict[str, Any]]:
    """Returns the answers to INFO, which is repeated for `seconds` while a server does not answer in time.

    Raises:
        NotSentError, RedisError: a server does not answer, or refuses.
    """
    clock = asyncio.get_running_loop().time
    end = clock() + seconds
    while True:
        try:
            return await client.info()
        except (NotSentError, errors.TimeoutError) as error:
            reason = error.__cause__ if isinstance(error, NotSentError) else error
            if not isinstance(reason, errors.TimeoutError) or clock() >= end:
                raise


def _client(url: ServerUrl, timing: Timing) -> SingleServer | Cluster:
    no_retry = Retry(NoBackoff(), 0)
    options: dict[str, Any] = {
        "socket_timeout": timing.attempt_timeout,
        "socket_connect_timeout": timing.attempt_timeout,
        "protocol": 2,
        "retry": no_retry,
    }
    context = _tls_context(url.tls)
    if context is not None:  # redis-py makes its own contexts; they are to accept the same certificates
        options |= {**url.tls, "ssl_exclude_verify_flags": [ssl.VERIFY_X509_STRICT]}
    if url.topology == "cluster":
        nodes = [ClusterNode(host, port) for host, port in url.hosts]
        return Cluster(RedisCluster(startup_nodes=nodes, username=url.user, password=url.password, **options))
    login = Login(timing.attempt_timeout, context, url.user, url.password, url.db)
    if url.topology == "sentinel":
        sentinels = Sentinel(url.hosts, sentinel_kwargs=options)  # type: ignore[no-untyped-call]
        return SingleServer(partial(_open_primary, sentinels, url.service, login))
    return SingleServer(partial(open_link, url.hosts[0], login))


async def _open_primary(sentinels: Sentinel, service: str, login: Login) -> Link:
    """Connects to the server that the Sentinels report as the primary of a service."""
    try:
        address = await sentinels.discover_master(service)
    except MasterNotFoundError:
        # Its own message has the representation of each client.
        raise MasterNotFoundError(f"no Sentinel there reports a primary of {service!r}") from None
    return await open_link(address, login)


def _tls_context(tls: dict[str, Any]) -> ssl.SSLContext | None:
    """Returns the context of connections with TLS; None without TLS.

    Raises:
        StoreError: a file can't be used.
    """
    if not tls:
        return None
    context = default_context()
    certificate, key, authority = (tls.get(name) for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"))
    if certificate is not None:
        with _reading("ssl_certfile", certificate, key):
            load_certificate(context, certificate, key)
    elif key is not None:
        raise StoreError("ssl_keyfile in POMELO_STORE needs the certificate: add ssl_certfile")
    if authority is not None:
        with _reading("ssl_ca_certs", authority):
            context.load_verify_locations(authority)
    return context


@contextmanager
def _reading(name: str, *files: str | None) -> Iterator[None]:
    """Names the files that can't be used; OpenSSL does not."""
    try:
        yield
    except OSError as error:  # also ssl.SSLError
        reason = "Use PEM without a password" if isinstance(error, ssl.SSLError) else error.strerror
        paths = " and ".join([file for file in files if file is not None])
        raise StoreError(f"{name} in POMELO_STORE: {paths} can't be read. {reason}") from error


def _names(url: ServerUrl) -> str:
    return ",".join(f"{host}:{port}" for host, port in url.hosts)


def _unusable(where: str, error: BaseException) -> StoreError:
    text = str(error)
    if "luster mode is not enabled" in text or "cluster support disabled" in text:
        return StoreError(f"The Redis server at {where} is no cluster. Use redis:// in its URL")
    if isinstance(error, errors.AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
        return StoreError(f"The Redis server at {where} refused the user or password of its URL")
    if isinstance(error, errors.NoPermissionError):
        return StoreError(f"The Redis server at {where} does not let its user run INFO. Allow all commands")
    return StoreError(
        f"The Redis server at {where} can't be reached: {text}. Start it, or correct POMELO_STORE"
    )


def _check(url: ServerUrl, info: dict[str, Any]) -> None:
    version = str(info.get("valkey_version") or info["redis_version"])
    name = "Valkey" if info.get("server_name") == "valkey" else "Redis"
    if tuple(int(part) for part in version.split(".")[:2]) < _MIN_REDIS:
        raise StoreError(f"Redis {version} is too old; Pomelo needs Redis 6.2 or later, or Valkey")
    clustered = bool(int(info.get("cluster_enabled", 0)))
    if clustered and url.topology != "cluster":
        raise StoreError(f"The {name} server is a node of a cluster. Use redis+cluster:// in its URL")
    if info.get("role") == "slave":
        raise StoreError(f"The {name} server is a replica, which takes no writes. Name its primary")
    policy = info.get("maxmemory_policy")
    if policy != "noeviction":
        raise StoreError(
            f"The {name} server throws credits away when its memory is full (maxmemory-policy {policy}). "
            "Set maxmemory-policy noeviction"
        )
    if url.durable and not int(info.get("aof_enabled", 0)):
        raise StoreError(
            f"The {name} server would forget credits when it restarts. Set appendonly yes, "
            "or add ?persistence=none to its URL if they may be lost"
        )
