"""Following the links in a vendor's answers, and not being led astray by one.

A provider whose vendor answers with links makes one `Links`: `vendors` tells whether a link may get the
vendor's key, `fetch` gets a file without it. It knows no vendor.

A file behind the provider's own base URL, or on an origin that the operator names, is fetched as it is. Any
other link leads, over https and to its usual port, to a name all of whose addresses are public: names are
looked up once, by the connection itself, and those very addresses are checked. So neither a private address
nor a name that changes its mind gets through.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from socket import AddressFamily

from aiohttp import DefaultResolver
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pomelo.errors import PomeloError, Replay
from pomelo.media import data_uris
from pomelo.providers.http.client import Http
from pomelo.providers.http.errors import ErrorMapping, TruncatedError, malformed_response

FILE_MOST = 32 * 1024 * 1024
"""Bytes of a file behind a link."""

_TEXT_MOST = FILE_MOST * 3 // 2
"""Characters of a file as base64, with line breaks."""

_PLAIN = re.compile(r"[\x21-\x5b\x5d-\x7e]{1,4096}")
"""A link as it may stand on a request's first line: no space, no backslash, nothing beyond ASCII."""

_NAME = re.compile(r"([a-z0-9_-]{1,63}\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]", re.IGNORECASE)
"""A full name of a host; an address, however it is written, is none."""

_NAT64 = IPv6Network("64:ff9b::/96")


class Downloader:
    """Tells links apart, and fetches what is behind them.

    `http` is the shared one, whose `origins` are trusted with files besides; `base_url` is the provider's.
    `domain` is the vendor's own, such as "bfl.ai": hosts below it are the vendor. `waits` are the seconds
    before each further attempt to fetch a file. `resolver` makes what looks names up.
    """

    def __init__(
        self,
        http: Http,
        base_url: str,
        domain: str,
        *,
        waits: Sequence[float] = (0.5, 1.0, 2.0),
        resolver: Callable[[], AbstractResolver] = DefaultResolver,
    ) -> None:
        self._http = http
        self._domain = "." + domain
        self._own = _origin_of(base_url)
        self._trusted = {origin for text in (base_url, *http.origins) if (origin := _origin_of(text))}
        self._waits = tuple(waits)
        self._resolver = resolver
        self._careful: Http | None = None

    async def aclose(self) -> None:
        """Closes its connections; idempotent."""
        careful, self._careful = self._careful, None
        if careful is not None:
            await careful.__aexit__(None, None, None)

    def vendors(self, link: object) -> URL:
        """The address that a link of the vendor's API names; the vendor's key may be sent there.

        Raises:
            PomeloError: provider_failed; it is no link, or leads elsewhere.
        """
        url = _parsed(link)
        if _origin(url) == self._own:
            return url
        if _ordinary(url) and (url.raw_host or "").lower().endswith(self._domain):
            return url
        raise malformed_response("a link of the API that leads elsewhere")

    async def fetch(self, link: object, dialect: ErrorMapping) -> bytes:
        """The file behind a link, at most FILE_MOST bytes, or within a `data:` URI. It is requested without
        any key, and again if the host fails, refuses it (it may not have the file yet) or sends only a part:
        what it takes to make the file was paid for, and a download is free.

        Raises:
            PomeloError: by the map; provider_failed where the link is none or leads to a private address.
        """
        if isinstance(link, str) and link[:5].lower() == "data:":
            return from_base64(link)
        url = _parsed(link)
        if _origin(url) in self._trusted:
            http = self._http
        elif _ordinary(url):
            http = await self._open()
        else:
            raise malformed_response("a link to a file that leads astray")
        for wait in self._waits:
            try:
                return (await http.fetch(url, {}, None, dialect, most=FILE_MOST))[0]
            except PomeloError as error:
                if not _may_pass(error):
                    raise
            await asyncio.sleep(wait)
        return (await http.fetch(url, {}, None, dialect, most=FILE_MOST))[0]

    async def _open(self) -> Http:
        if self._careful is None:
            # Nothing is awaited in there: no other call gets in between.
            self._careful = await self._http.apart(PublicResolver(self._resolver())).__aenter__()
        return self._careful


class PublicResolver(AbstractResolver):
    """Looks names up by another resolver, and gives public addresses alone."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: AddressFamily = AddressFamily.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of a name.

        Raises:
            OSError: it has none.
            ValueError: one of them is not public. It is no OSError: to ask again is pointless.
        """
        found = await self._inner.resolve(host, port, family)
        if not all(is_public(result["host"]) for result in found):
            raise ValueError("a name with an address that is not public")
        return found

    async def close(self) -> None:
        """Closes the other resolver."""
        await self._inner.close()


def from_base64(text: object) -> bytes:
    """The file within a `data:` URI or base64, at most FILE_MOST bytes, as leniently as callers' are read.

    Raises:
        PomeloError: provider_failed; it is neither, or larger.
    """
    if isinstance(text, str) and len(text) <= _TEXT_MOST:
        try:
            _, start = data_uris.head(text, "image")
            return b"".join(data_uris.decode(text, start, "image"))
        except PomeloError:  # it is worded for callers
            pass
    raise malformed_response("a file in base64 that can't be read")


def is_public(text: str) -> bool:
    """Whether an address can be reached by anyone on the internet, and is one host's."""
    try:
        address: IPv4Address | IPv6Address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address):
        within = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            within = IPv4Address(int(address) & 0xFFFFFFFF)
        if within is not None:
            address = within
        elif address.teredo is not None or address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _may_pass(error: PomeloError) -> bool:
    """Whether a download that failed may succeed a moment later."""
    passing = ("provider_unavailable", "overloaded")
    return error.code in passing or error.replay != Replay.NEVER or isinstance(error, TruncatedError)


def _parsed(link: object) -> URL:
    # One parser for the check and the request. `encoded`: a signed link is sent as it is, to the letter.
    if isinstance(link, str) and _PLAIN.fullmatch(link):
        try:
            url = URL(link, encoded=True)
            if url.scheme in ("http", "https") and url.raw_host and url.port and url.raw_user is None:
                return url
        except ValueError:
            pass
    raise malformed_response("a link that is none")


def _ordinary(url: URL) -> bool:
    """Whether a link leads over https, by its usual port, to a host with a full name."""
    return url.scheme == "https" and url.port == 443 and bool(_NAME.fullmatch(url.raw_host or ""))


def _origin(url: URL) -> str:
    return f"{url.scheme}://{(url.raw_host or '').lower()}:{url.port}"


def _origin_of(text: str) -> str:
    """The origin of an operator's address; empty where it is none."""
    try:
        url = URL(text)
    except ValueError:
        return ""
    return _origin(url) if url.raw_host and url.port else ""
