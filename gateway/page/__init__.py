"""The pages for developers, at `/`, and for operators. Their files are static: the scripts call the REST API,
or read the metrics."""

from __future__ import annotations

from pathlib import Path

from gateway.request import Request
from gateway.responses import Response
from gateway.state import Gateway
from gateway.static_files import StaticFiles, respond_with_file
from pomelo.call import Call
from pomelo.errors import PomeloError

_FOLDER = Path(__file__).with_name("static")

_FILES = StaticFiles(_FOLDER, _FOLDER / "vendor")

OPERATOR_FILES = StaticFiles(_FOLDER, _FOLDER / "operator")
"""The files of the operator's page, which the server of metrics sends."""


async def get_page(gateway: Gateway, request: Request, call: Call) -> Response:
    """Returns the page, or the file of it that the path names: a script, a style sheet or an icon; 304 if the
    browser has it.

    Raises:
        PomeloError: not_found.
    """
    if not gateway.options.page:
        raise PomeloError("not_found")
    return await respond_with_file(_FILES, request, call)
