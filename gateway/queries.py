"""Query parameters: paths under /api/v1 refuse those that they do not take, rather than ignore them."""

from __future__ import annotations

from collections.abc import Collection

from gateway.request import Request
from pomelo.errors import PomeloError
from pomelo.service import Visit


async def check_no_parameters(request: Request, visit: Visit) -> None:
    """Refuses a request whose path takes no query parameters and which has one.

    Raises:
        PomeloError: invalid_parameter, or what takes precedence over it.
    """
    for name in request.url.query:
        raise await visit.refuse(unknown_parameter(name))


def unknown_parameter(name: str, known: Collection[str] = ()) -> PomeloError:
    """Returns the error for a parameter that is not one of `known`, those that the path takes."""
    shown = name[:100].encode("utf-8", "replace").decode()
    valid = f"Valid: {', '.join(known)}" if known else "This path takes no parameters"
    return PomeloError("invalid_parameter", f"Unknown query parameter: {shown}. {valid}", field=shown)
