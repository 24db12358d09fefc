"""A real S3 server on loopback (moto's), which tests can kill, pause and restart."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from itertools import count
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tests.ports import free_port

_names = count()


class S3Server:
    """A server with buckets in its memory."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

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
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 30
        while True:
            try:
                self._do("GET", "moto-api/")
            except URLError:
                assert time.monotonic() < until, "moto does not start"
                assert self._process.poll() is None, "moto ended"
                time.sleep(0.02)
            else:
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

    def stop(self) -> None:
        """Pauses the server until `resume`."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Continues a paused server."""
        self._send(signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._send(signal.SIGKILL)
            self._process.wait()

    def _do(self, method: str, path: str, data: bytes | None = None) -> None:
        headers = {"Content-Type": "application/json"}
        request = Request(f"http://127.0.0.1:{self.port}/{path}", data, headers, method=method)
        with urlopen(request, timeout=10):
            pass

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


@cache
def any_server() -> S3Server:
    """A server that all tests share. It ends with this process."""
    server = S3Server().start()
    atexit.register(server.close)
    return server
