"""The OpenAPI description is complete; the fault tests check that it is correct."""

from __future__ import annotations

from gateway.openapi.document import document
from gateway.routes import OPEN_ROUTES, ROUTES
from gateway.types import TASK_FORMATS
from pomelo.errors import TABLE


def test_every_route_every_field_and_every_error_of_a_task_is_described() -> None:
    described = document("")
    paths = {(method.upper(), path) for path, ops in described["paths"].items() for method in ops}
    assert paths == {(r.method, r.path) for r in ROUTES} | {("GET", "/media/{media_id}")}
    assert {r.path for r in OPEN_ROUTES} == {"/media/{media_id}", "/openapi.json", "/healthz"}
    answers = described["paths"]["/api/v1/task"]["post"]["responses"]
    described_codes = {code for response in answers.values() for code in response["description"].split(", ")}
    assert described_codes >= set(TABLE) - {"not_found", "method_not_allowed"}
    form = described["components"]["schemas"]["Form"]["properties"]
    assert set(form) == {"model", "stream", "audio"}.union(*(each.fields for each in TASK_FORMATS.values()))
