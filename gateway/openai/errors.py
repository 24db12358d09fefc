"""Errors of the paths under /v1, as OpenAI's SDKs read them.

The HTTP status decides which exception an SDK raises, the header `X-Should-Retry` whether it tries again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pomelo.errors import PomeloError

if TYPE_CHECKING:
    from gateway.request import Request


def is_openai(request: Request) -> bool:
    """Returns whether the request is for a path of the OpenAI-compatible API, known or not."""
    return request.url.path.startswith("/v1/")


def retry_header(error: PomeloError) -> dict[str, str]:
    """Returns the header that says whether a retry makes sense; without it, SDKs retry every 5xx, 409 and
    429."""
    retry = error.retry_after is not None and not error.row.permanent
    return {"X-Should-Retry": "true" if retry else "false"}
