"""From a URL to servers that are fit to keep credits, or a sentence that says what to do about it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from redis import exceptions as errors
from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from pomelo.stores.base import StoreError
from pomelo.stores.redis.client import Cluster, OneServer
from pomelo.stores.redis.connection import Timing, is_closed_transport

SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")

_FORMS = (
    "redis://[USER:PASSWORD@]HOST[:PORT][/DB], rediss://… with TLS, redis+cluster://HOST:PORT[,HOST:PORT…], "
    "or redis+sentinel://HOST:PORT[,HOST:PORT…]/SERVICE"
)
_TLS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_OLDEST = (6, 2)
_FAILURES = (errors.RedisError, errors.RedisClusterException, OSError, ssl.SSLError)


@dataclass(frozen=True, slots=True)
class Place:
    """What a URL says. `service` is the name that Sentinels know; `durable`: the server must write what it
    keeps to its disk."""

    kind: str
    hosts: tuple[tuple[str, int], ...]
    service: str = ""
    db: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: dict[str, Any] = field(default_factory=dict)
    durable: bool = True


def read_url(url: str) -> Place:
    """What a URL says.

    Raises:
        StoreError: it has none of the forms. The message holds no password.
    """
    scheme, _, rest = url.partition("://")
    base, _, kind = scheme.partition("+")
    parts = urlsplit("//" + rest)
    login, _, addresses = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    path = parts.path.strip("/")
    persistence = options.pop("persistence", "aof")
    service, _, db = path.partition("/") if kind == "sentinel" else ("", "", path)
    try:
        hosts = tuple(_host(text, 26379 if kind == "sentinel" else 6379) for text in addresses.split(","))
        place = Place(
            kind=kind,
            hosts=hosts,
            service=unquote(service),
            db=int(db or "0"),
            user=unquote(user) or None,
            password=unquote(password) or None,
            tls={"ssl": True} if base == "rediss" else {},
            durable=persistence == "aof",
        )
    except ValueError:
        place = None
    unknown = set(options) - set(_TLS if base == "rediss" else ())
    wrong = (
        place is None
        or scheme not in SCHEMES
        or (kind == "sentinel") != bool(place.service)
        or (kind == "" and len(place.hosts) != 1)
        or (kind == "cluster" and path != "")
        or persistence not in ("aof", "none")
        or unknown
    )
    if wrong or place is None:
        raise StoreError(
            f"The URL of the store can't be read. Use {_FORMS}; ?persistence=none allows a server without AOF"
        )
    place.tls.update(options)
    return place


def _host(text: str, port: int) -> tuple[str, int]:
    parts = urlsplit("//" + text)
    if not parts.hostname:
        raise ValueError(text)
    return parts.hostname, parts.port or port


async def connect(place: Place, timing: Timing) -> OneServer | Cluster:
    """Connects, and looks whether the servers are fit.

    Raises:
        StoreError: they can't be reached, or are not fit.
    """
    where = ",".join(f"{host}:{port}" for host, port in place.hosts)
    client: OneServer | Cluster | None = None
    try:
        client = _client(place, timing)
        for info in await client.info():
            _check(place, info)
    except BaseException as error:
        if client is not None:
            await client.aclose()
        if isinstance(error, StoreError) or not (isinstance(error, _FAILURES) or is_closed_transport(error)):
            raise
        raise _refused(place, where, error) from error
    return client


def _client(place: Place, timing: Timing) -> OneServer | Cluster:
    settings: dict[str, Any] = {
        "username": place.user,
        "password": place.password,
        "socket_timeout": timing.attempt,
        "socket_connect_timeout": timing.attempt,
        "protocol": 2,
        **place.tls,
    }
    if place.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in place.hosts]
        return Cluster(RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), 0), **settings))
    once = Retry(NoBackoff(), 0)
    if place.kind == "sentinel":
        sentinels = Sentinel(  # type: ignore[no-untyped-call]
            place.hosts,
            sentinel_kwargs={
                "socket_timeout": timing.attempt,
                "socket_connect_timeout": timing.attempt,
                "protocol": 2,
                "retry": once,
                **place.tls,
            },
            retry=once,
            db=place.db,
            **settings,
        )
        return OneServer(sentinels.master_for(place.service))
    host, port = place.hosts[0]
    return OneServer(Redis(host=host, port=port, db=place.db, retry=once, **settings))


def _refused(place: Place, where: str, error: BaseException) -> StoreError:
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


def _check(place: Place, info: dict[str, Any]) -> None:
    version = str(info.get("valkey_version") or info["redis_version"])
    name = "Valkey" if info.get("server_name") == "valkey" else "Redis"
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise StoreError(f"Redis {version} is too old; Pomelo needs Redis 6.2 or later, or Valkey")
    clustered = bool(int(info.get("cluster_enabled", 0)))
    if clustered and place.kind != "cluster":
        raise StoreError(f"The {name} server is a node of a cluster. Use redis+cluster:// in its URL")
    if info.get("role") == "slave":
        raise StoreError(f"The {name} server is a replica, which takes no writes. Name its primary")
    policy = info.get("maxmemory_policy")
    if policy != "noeviction":
        raise StoreError(
            f"The {name} server throws credits away when its memory is full (maxmemory-policy {policy}). "
            "Set maxmemory-policy noeviction"
        )
    if place.durable and not int(info.get("aof_enabled", 0)):
        raise StoreError(
            f"The {name} server would forget credits when it restarts. Set appendonly yes, "
            "or add ?persistence=none to its URL if they may be lost"
        )
