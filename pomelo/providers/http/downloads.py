"""Downloads files from links in a vendor's responses, without access to private addresses.

A file behind the provider's own base URL, or on an origin that the operator trusts, is fetched from any
address. Any other link must use https, port 443 and a host name whose addresses are all public. A name is
resolved once, by the connection itself, and exactly those addresses are checked. So neither a private address
nor DNS rebinding gets through.
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

from pomelo.errors import PomeloError
from pomelo.media import data_uris
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.client import Http
from pomelo.providers.http.errors import (
    ErrorMapping,
    PrivateAddressError,
    TruncatedError,
    malformed_response,
)

MAX_FILE_BYTES = 32 * 1024 * 1024
"""The largest file that is downloaded."""

_MAX_BASE64_CHARS = MAX_FILE_BYTES * 3 // 2
"""The longest base64 text of a file, with line breaks."""

_LINK = re.compile(r"[\x21-\x5b\x5d-\x7e]{1,4096}")
"""The characters that a link may have in a request line: ASCII without spaces and backslashes."""

_HOST_NAME = re.compile(r"([a-z0-9_-]{1,63}\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]", re.IGNORECASE)
"""A fully qualified host name; no notation of an IP address matches."""

_NAT64 = IPv6Network("64:ff9b::/96")


class Downloader:
    """Checks the links in a vendor's responses, and downloads files.

    `http` is the shared client, whose `origins` are trusted; `base_url` is the provider's. Hosts below
    `domain`, such as "bfl.ai", belong to the vendor. `waits` are the seconds before each further attempt to
    download a file. `resolver` creates the resolver of host names.
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
        self._base_origin = _origin_of(base_url)
        self._trusted = {origin for text in (base_url, *http.origins) if (origin := _origin_of(text))}
        self._waits = tuple(waits)
        self._resolver = resolver
        self._public_http: Http | None = None

    async def aclose(self) -> None:
        """Close its connections; idempotent."""
        http, self._public_http = self._public_http, None
        if http is not None:
            await http.__aexit__(None, None, None)

    def api_url(self, link: object) -> URL:
        """Return the URL of a link to the vendor's API; the vendor's key may be sent there.

        Raises:
            UpstreamError: provider_failed; the link is invalid, or leads to a host of others.
        """
        url = _parse(link)
        if _origin(url) == self._base_origin:
            return url
        if _is_https_name(url) and (url.raw_host or "").lower().endswith(self._domain):
            return url
        raise malformed_response("a link to the API that leads to another host")

    async def fetch(
        self, link: object, error_mapping: ErrorMapping, is_complete: Callable[[bytes], bool] | None = None
    ) -> bytes:
        """Return the file behind a link or within a `data:` URI, at most MAX_FILE_BYTES. The request has no
        key. It is repeated if the host fails, refuses it (the file may not be there yet) or sends only a
        part, because the file was paid for and a download is free. `is_complete` finds a part that arrived as
        a whole response.

        Raises:
            UpstreamError: by the error map; provider_failed if the link is invalid or its address private.
        """
        if isinstance(link, str) and link[:5].lower() == "data:":
            return from_base64(link)
        url = _parse(link)
        if _origin(url) in self._trusted:
            http = self._http
        elif _is_https_name(url):
            http = await self._open()
        else:
            raise malformed_response("a link to a file that is not public")
        for wait in self._waits:
            try:
                file, _ = await http.fetch(url, {}, None, error_mapping, max_bytes=MAX_FILE_BYTES)
                if is_complete is None or is_complete(file):
                    return file
            except UpstreamError as error:
                if not _is_transient(error):
                    raise
                wait = max(wait, error.wait or 0)
            await asyncio.sleep(wait)
        return (await http.fetch(url, {}, None, error_mapping, max_bytes=MAX_FILE_BYTES))[0]

    async def _open(self) -> Http:
        if self._public_http is None:
            # __aenter__ awaits nothing, so no other call runs in between.
            self._public_http = await self._http.with_resolver(PublicResolver(self._resolver())).__aenter__()
        return self._public_http


class PublicResolver(AbstractResolver):
    """Resolves names by another resolver, and returns only public addresses."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: AddressFamily = AddressFamily.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of a name.

        Raises:
            OSError: the name has none.
            PrivateAddressError: an address is not public.
        """
        results = await self._inner.resolve(host, port, family)
        if not all(is_public(result["host"]) for result in results):
            raise PrivateAddressError
        return results

    async def close(self) -> None:
        await self._inner.close()


def from_base64(text: object) -> bytes:
    """Decode a `data:` URI or base64, at most MAX_FILE_BYTES, as leniently as input of callers.

    Raises:
        UpstreamError: provider_failed; the text is neither, or too large.
    """
    if isinstance(text, str) and len(text) <= _MAX_BASE64_CHARS:
        try:
            _, start = data_uris.head(text, "image")
            return b"".join(data_uris.decode(text, start, "image"))
        except PomeloError:  # its message is for callers
            pass
    raise malformed_response("a file in base64 that can't be read")


def is_public(text: str) -> bool:
    """Return whether an address is one host's and can be reached from the whole internet."""
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
        elif address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _is_transient(error: UpstreamError) -> bool:
    """Whether a download that failed may succeed a moment later."""
    transient = ("provider_unavailable", "overloaded", "deadline_exceeded")
    never = error.retry is RetryPolicy.NEVER
    return error.code in transient or not never or isinstance(error, TruncatedError)


def _parse(link: object) -> URL:
    # The check and the request share this URL. `encoded`: a signed link is sent exactly as it was received.
    if isinstance(link, str) and _LINK.fullmatch(link):
        try:
            url = URL(link, encoded=True)
            if url.scheme in ("http", "https") and url.raw_host and url.port and url.raw_user is None:
                return url
        except ValueError:
            pass
    raise malformed_response("an invalid link")


def _is_https_name(url: URL) -> bool:
    """Whether a link uses https, port 443 and a fully qualified host name."""
    return url.scheme == "https" and url.port == 443 and bool(_HOST_NAME.fullmatch(url.raw_host or ""))


def _origin(url: URL) -> str:
    return f"{url.scheme}://{(url.raw_host or '').lower()}:{url.port}"


def _origin_of(text: str) -> str:
    """The origin of a URL that the operator wrote; empty if it is invalid."""
    try:
        url = URL(text)
    except ValueError:
        return ""
    return _origin(url) if url.raw_host and url.port else ""
