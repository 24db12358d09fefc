"""What the adapters of vendors with an API key share."""

from __future__ import annotations

from typing import ClassVar

from pomelo.providers.base import Probe
from pomelo.providers.credentials import Credentials
from pomelo.providers.http.client import Http


class Vendor:
    """A vendor's API that is called with a key, which is sent as the subclass's `probe` describes."""

    probe: ClassVar[Probe]

    def __init__(self, credentials: Credentials, http: Http) -> None:
        key = (credentials.api_key or "").strip()
        self.configured = bool(key)
        self._http = http
        self._base = credentials.base_url.rstrip("/")
        self._headers = dict(self.probe.headers)
        if key:
            self._headers[self.probe.header] = self.probe.prefix + key
        self._json_headers = self._headers | {"Content-Type": "application/json"}

    async def aclose(self) -> None:
        pass  # the HTTP client is shared
