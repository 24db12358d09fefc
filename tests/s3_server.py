"""A real S3 server on loopback (moto's), which tests can kill, pause and restart."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Mapping
from functools import cache, partial
from itertools import count
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tests.server_program import ServerProgram

_names = count()


class S3Server(ServerProgram):
    """A server with buckets in its memory."""

    @property
    def variables(self) -> Mapping[str, str]:
        """The variables by which clients find the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "pomelo",
            "AWS_SECRET_ACCESS_KEY": "for tests",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> S3Server:
        """Starts the server and waits until it answers."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.launch(command, partial(self._do, "GET", "moto-api/"), (OSError,), lambda: "moto does not start")
        return self

    def new_bucket(self) -> str:
        """The URL of a prefix in a new bucket."""
        url = f"s3://media-{os.getpid()}-{next(_names)}/some/prefix"
        self.create_bucket(url)
        return url

    def create_bucket(self, url: str) -> None:
        """Creates the bucket of a URL."""
        self._do("PUT", urlsplit(url).netloc)

    def deny(self, url: str, action: str) -> None:
        """Denies an action, such as s3:PutObject, on all files of a bucket."""
        name = urlsplit(url).netloc
        statement = {
            "Effect": "Deny",
            "Principal": "*",
            "Action": action,
            "Resource": f"arn:aws:s3:::{name}/*",
        }
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        self._do("PUT", f"{name}?policy", json.dumps(policy).encode())

    def _do(self, method: str, path: str, data: bytes | None = None) -> None:
        headers = {"Content-Type": "application/json"}
        request = Request(f"http://127.0.0.1:{self.port}/{path}", data, headers, method=method)
        with urlopen(request, timeout=20):
            pass


@cache
def any_server() -> S3Server:
    """A server that all tests share. It ends with this process."""
    server = S3Server().start()
    atexit.register(server.close)
    return server
