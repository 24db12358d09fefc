"""The API reference at /docs: Swagger UI, which shows /openapi.json.

`files` has the files of swagger-ui-dist 5.35.0 as they were published, with their licences, and a page of our
own. To update Swagger UI, copy the files of the same names from the npm package.
"""

from __future__ import annotations

from pathlib import Path

from gateway.request import Request
from gateway.responses import Response
from gateway.state import Gateway
from gateway.static_files import StaticFiles, respond_with_file
from pomelo.call import Call

_FILES = StaticFiles(Path(__file__).with_name("files"))


async def get_reference(gateway: Gateway, request: Request, call: Call) -> Response:
    """Returns the page, or the file of it that the path names; 304 if the browser has it.

    Raises:
        PomeloError: not_found.
    """
    return await respond_with_file(_FILES, request, call)
