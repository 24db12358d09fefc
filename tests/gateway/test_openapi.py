"""The OpenAPI description is complete; the fault tests check that it is correct."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from gateway.account import parse_query
from gateway.errors import error_body
from gateway.objects import render_account, render_model, render_records, render_sums
from gateway.openapi import openai
from gateway.openapi.document import Description, document
from gateway.openapi.schema import RESPONSE_HEADERS, KnownModel
from gateway.routes import OPEN_ROUTES, OPENAI_ROUTES, ROUTES
from gateway.types import COMMON_FIELDS, TASK_FORMATS
from gateway.types.base import StreamObjects, TaskFormat
from gateway.types.text.results import render_tool_call
from pomelo.call import DEFAULT_TIMEOUT, Call
from pomelo.errors import NOT_UNDER_API, TABLE, PomeloError
from pomelo.fields import FieldRule
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.gen.v1.model_service_pb2 import Model, PriceUnit
from pomelo.gen.v1.task_pb2 import TaskStarted, TaskType
from pomelo.gen.v1.text_pb2 import ToolCallDelta
from pomelo.gen.v1.usage_pb2 import Mode
from pomelo.status import HEADERS, header_name

REST_CODES = [code for code in TABLE if code not in NOT_UNDER_API]


def test_every_route_every_field_and_every_error_of_a_task_is_described() -> None:
    described = document("")
    paths = {(method.upper(), path) for path, ops in described["paths"].items() for method in ops}
    assert paths == {*ROUTES, *OPENAI_ROUTES, ("GET", "/media/{media_id}")}
    assert set(OPEN_ROUTES) == {
        *("/media/{media_id}", "/openapi.json", "/healthz"),
        *("/docs", "/docs/{file}"),
        *("/", "/page/{name}"),
    }
    answers = described["paths"]["/api/v1/task"]["post"]["responses"]
    described_codes = {code for response in answers.values() for code in response["description"].split(", ")}
    assert described_codes >= set(REST_CODES) - {"not_found", "method_not_allowed"}
    assert not described_codes & NOT_UNDER_API
    error = described["components"]["schemas"]["Error"]["properties"]["error"]
    assert error["properties"]["code"]["enum"] == REST_CODES
    form = described["components"]["schemas"]["Form"]["properties"]
    assert set(form) == {"model", "stream", "audio"}.union(*(each.fields for each in TASK_FORMATS.values()))


DOCUMENT = document("")
SCHEMAS = DOCUMENT["components"]["schemas"]
TYPES = ("TextTask", "ImageTask")


def described_rules(schema: dict[str, Any]) -> dict[str, FieldRule]:
    """The rules that the schema of an object describes, by field; without the fields of every task type, and
    those that have no effect."""
    without_rule = COMMON_FIELDS | {"n", "logprobs", "top_logprobs", "logit_bias"}
    fields = {name: each for name, each in schema["properties"].items() if name not in without_rule}
    return {name: described_rule(each, name in schema["required"]) for name, each in fields.items()}


def described_rule(schema: dict[str, Any], required: bool) -> FieldRule:
    """The rule that a field's schema describes."""
    if "anyOf" in schema:
        *_, reference, null = schema["anyOf"]
        assert null == {"type": "null"}
        name = reference["$ref"].removeprefix("#/components/schemas/")
        has_rules = name == "VoiceSettings"  # the members of the others have none
        return FieldRule("object", required, fields=described_rules(SCHEMAS[name]) if has_rules else None)
    types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    choices = schema.get("enum", ())
    assert ("null" in types) is not required
    assert not choices or (None in choices) is not required
    if required:
        assert schema["minItems" if "array" in types else "minLength"] >= 1
    return FieldRule(
        type=[each for each in types if each != "null"][-1],
        required=required,
        minimum=schema.get("minimum"),
        maximum=schema.get("maximum"),
        max_length=schema.get("maxLength"),
        max_items=schema.get("maxItems", schema.get("maxProperties")),
        choices=tuple(each for each in choices if each is not None),
        default=schema.get("default"),
    )


@pytest.mark.parametrize("task_type", TASK_FORMATS)
def test_every_field_is_described_with_its_rule(task_type: int) -> None:
    schema = SCHEMAS[TASK_FORMATS[task_type].schema_name]
    assert described_rules(schema) == TASK_FORMATS[task_type].rules
    assert schema["properties"].keys() >= COMMON_FIELDS
    assert set(schema["required"]) >= {"model"}


# --- the document


def schemas_within(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a schema and those within it, each with its path."""
    yield path, schema
    for name, member in schema.get("properties", {}).items():
        yield from schemas_within(member, f"{path}.{name}")
    for key in ("items", "additionalProperties", "contentSchema"):
        if isinstance(schema.get(key), dict):
            yield from schemas_within(schema[key], f"{path}.{key}")
    for key in ("anyOf", "oneOf"):
        for number, member in enumerate(schema.get(key, ())):
            yield from schemas_within(member, f"{path}.{key}[{number}]")


def test_every_schema_says_which_values_are_valid() -> None:
    theirs = openai.section({}).schemas  # which have parameters that are ignored, whatever they are
    operations = [each for operations in DOCUMENT["paths"].values() for each in operations.values()]
    parameters = [(each["name"], each["schema"]) for one in operations for each in one.get("parameters", ())]
    contents = [one["requestBody"]["content"] for one in operations if "requestBody" in one]
    contents += [each.get("content", {}) for one in operations for each in one["responses"].values()]
    contained = [(kind, content["schema"]) for each in contents for kind, content in each.items()]
    headers = [(name, each["schema"]) for name, each in RESPONSE_HEADERS.items()]
    unclear = [
        path
        for name, schema in (*SCHEMAS.items(), *parameters, *contained, *headers)
        for path, each in schemas_within(schema, name)
        if name not in theirs
        and not each.keys() & {"type", "enum", "const", "anyOf", "oneOf", "$ref", "pattern"}
    ]
    assert unclear == [
        "AssistantMessage.parsed",  # whatever an SDK has read
        "AssistantMessage.annotations.items",  # the list is always empty
        "ToolCall.function.parsed_arguments",
    ]
    arrays = [
        (path, each)
        for name, schema in SCHEMAS.items()
        for path, each in schemas_within(schema, name)
        if "array" in each.get("type", ())
    ]
    assert [path for path, each in arrays if "items" not in each] == []


def test_no_property_has_null_as_its_only_type() -> None:
    """openapi-generator makes no Python client of such a description."""
    within = [each for name, schema in SCHEMAS.items() for each in schemas_within(schema, name)]
    assert [path for path, each in within if each.get("type") == "null" and path[-1] != "]"] == []


def test_every_operation_has_the_tag_of_its_section() -> None:
    tags = {tag["name"]: tag["description"] for tag in DOCUMENT["tags"]}
    assert list(tags) == ["Tasks", "Models", "Account", "Media", "OpenAI"]
    assert all(tags.values())
    for path, operations in DOCUMENT["paths"].items():
        for operation in operations.values():
            (tag,) = operation["tags"]
            assert tag in tags
            assert (tag == "OpenAI") == path.startswith("/v1/")
            assert operation["operationId"]
            assert operation["summary"]


def test_the_examples_of_a_task_and_of_its_results_are_valid() -> None:
    operation = DOCUMENT["paths"]["/api/v1/task"]["post"]
    requests = operation["requestBody"]["content"]["application/json"]["examples"]
    shown = {title: body for each in TASK_FORMATS.values() for title, body in each.examples.items()}
    assert {title: example["value"] for title, example in requests.items()} == shown
    for each in TASK_FORMATS.values():
        for body in each.examples.values():
            assert is_described(each.schema_name, body)
        assert each.example_model in [body["model"] for body in each.examples.values()]
        assert SCHEMAS[each.schema_name]["properties"]["model"]["examples"] == [each.example_model]
    results = operation["responses"]["200"]["content"]["application/json"]["examples"]
    for each in TASK_FORMATS.values():
        value = results[each.result_schema_name]["value"]
        assert is_described(each.result_schema_name, value)
        assert value["created"] == 1234567890


@pytest.mark.parametrize("code", REST_CODES)
def test_the_example_of_every_error_is_the_error(code: str) -> None:
    example = DOCUMENT["components"]["examples"][code]
    assert example == {"summary": code, "value": json.loads(error_body(PomeloError(code)))}


def test_a_description_is_made_once_for_the_same_models_and_the_oldest_is_dropped() -> None:
    text, image = KnownModel(TaskType.TASK_TYPE_TEXT), KnownModel(TaskType.TASK_TYPE_IMAGE)
    description = Description("https://pomelo.example", lambda: {"gpt-4": text})
    first = description.to_json({})
    assert description.to_json({}) is first
    assert json.loads(first)["servers"] == [{"url": "https://pomelo.example"}]
    for number in range(8):
        own = json.loads(description.to_json({f"own-{number}": image}))
        models = {name: own["components"]["schemas"][name]["properties"]["model"] for name in TYPES}
        assert models["TextTask"]["enum"] == ["gpt-4"]
        assert models["ImageTask"]["enum"] == [f"own-{number}"]
    assert description.to_json({"own-7": image}) is description.to_json({"own-7": image})
    assert description.to_json({}) is not first
    assert description.to_json({}) == first


# --- operations


def test_the_server_is_the_public_url_or_the_root() -> None:
    assert DOCUMENT["servers"] == [{"url": "/"}]
    assert document("https://pomelo.example")["servers"] == [{"url": "https://pomelo.example"}]


def test_every_operation_requires_a_key_and_media_also_takes_a_signature() -> None:
    assert DOCUMENT["security"] == [{"key": []}]
    declared = {
        path: operation["security"]
        for path, operations in DOCUMENT["paths"].items()
        for operation in operations.values()
        if "security" in operation
    }
    assert declared == {"/media/{media_id}": [{}, {"key": []}]}


@pytest.mark.parametrize("path", DOCUMENT["paths"])
def test_every_operation_describes_the_errors_that_any_request_may_get(path: str) -> None:
    (operation,) = DOCUMENT["paths"][path].values()
    described = {code for each in operation["responses"].values() for code in each["description"].split(", ")}
    assert described >= {"invalid_api_key", "invalid_parameter", "overloaded", "store_unavailable"}
    assert described >= {"rate_limit_exceeded", "concurrency_limit_exceeded"}
    assert described >= {"shutting_down", "server_unavailable", "internal_error"}
    of_files = {"206", "304", "416"} & set(operation["responses"])
    assert of_files == ({"206", "304", "416"} if path.startswith("/media/") else set())


@pytest.mark.parametrize(
    ("path", "codes"),
    [
        ("/api/v1/account", {"model_not_allowed"}),  # the account's plan was removed
        ("/api/v1/models", {"model_not_allowed"}),
        ("/v1/models", {"model_not_allowed"}),
        ("/api/v1/usage", {"deadline_exceeded"}),
        ("/api/v1/models/{name}", {"unsupported_model", "model_not_allowed", "not_found"}),
        ("/media/{media_id}", {"not_found", "deadline_exceeded", "provider_unavailable"}),
    ],
)
def test_an_operation_describes_its_own_errors(path: str, codes: set[str]) -> None:
    (operation,) = DOCUMENT["paths"][path].values()
    described = {code for each in operation["responses"].values() for code in each["description"].split(", ")}
    assert described >= codes


def test_bodies_and_the_parts_of_a_path_are_required() -> None:
    for path, operations in DOCUMENT["paths"].items():
        for operation in operations.values():
            assert operation.get("requestBody", {"required": True})["required"]
            parts = [each for each in operation.get("parameters", ()) if each["in"] == "path"]
            assert [each["name"] for each in parts] == re.findall(r"{(\w+)}", path)
            assert all(each["required"] for each in parts)


def test_the_headers_of_a_task_are_described_as_they_are_read() -> None:
    parameters = DOCUMENT["paths"]["/api/v1/task"]["post"]["parameters"]
    schemas = {each["name"]: each["schema"] for each in parameters}
    for text in ("!~" * 64, "a" * 129, "a" * 255, "a" * 256, "a b", "é"):
        headers = {"x-request-id": text, "idempotency-key": text}
        call = Call.from_headers(headers.get, protocol="rest")
        is_key = bool(re.fullmatch(schemas["Idempotency-Key"]["pattern"], text))
        assert (call.request_id == text) == bool(re.fullmatch(schemas["X-Request-Id"]["pattern"], text))
        assert (call.header_error is None) == is_key
    timeout = schemas["X-Request-Timeout"]
    assert timeout["maximum"] == timeout["default"] == DEFAULT_TIMEOUT


def test_every_query_parameter_of_usage_is_described_as_it_is_parsed() -> None:
    (operation,) = DOCUMENT["paths"]["/api/v1/usage"].values()
    schemas = {each["name"]: each["schema"] for each in operation["parameters"]}
    dimensions, metadata = schemas["group_by"]["anyOf"]
    for group in dimensions["enum"]:
        request = parse_query({"group_by": group})
        assert isinstance(request, pb.SumUsageRequest)
        assert request.group_by[0].dimension
    assert re.fullmatch(metadata["pattern"], "metadata.a b")
    request = parse_query({"group_by": "metadata.a b"})
    assert isinstance(request, pb.SumUsageRequest)
    assert request.group_by[0].metadata_key == "a b"
    for bound in ("minimum", "maximum"):
        size = schemas["page_size"][bound]
        assert parse_query({"page_size": str(size)}).page_size == size
        with pytest.raises(PomeloError):
            parse_query({"page_size": str(size + (1 if bound == "maximum" else -1))})
    with pytest.raises(PomeloError) as caught:
        parse_query({"x": "1"})
    assert caught.value.message == f"Unknown query parameter: x. Valid: {', '.join(schemas)}"


# --- objects in responses


def strict(schema: Any) -> Any:
    """Returns a schema in which every object has no other members than those that are described."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {name: strict(each) for name, each in schema.items()}
    return copy | {"unevaluatedProperties": False} if "properties" in schema else copy


STRICT = {"schemas": strict(SCHEMAS)}


def is_described(name: str, value: Any) -> bool:
    """Whether a value is valid for a schema, every member of an object being described."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": STRICT}
    return jsonschema_rs.validator_for(schema).is_valid(value)


@pytest.mark.parametrize("code", REST_CODES)
def test_the_body_of_every_error_is_described(code: str) -> None:
    assert is_described("Error", json.loads(error_body(PomeloError(code))))


@pytest.mark.parametrize("source", pb.UsageSource.values())
@pytest.mark.parametrize("task_type", [0, *TASK_FORMATS])
def test_every_record_and_total_of_usage_is_described(
    source: pb.UsageSource.ValueType, task_type: TaskType.ValueType
) -> None:
    record = pb.UsageRecord(
        mode=Mode.MODE_TEST, source=source, task_type=task_type, protocol="grpc", cost_micros=1
    )
    records = json.loads(render_records(pb.ListUsageResponse(records=[record])))
    sums = json.loads(render_sums(pb.SumUsageResponse(sums=[pb.UsageSum(groups=["gpt-4"])])))
    for listed, name in ((records, "UsageRecord"), (sums, "UsageTotal")):
        assert is_described("UsageList", listed)
        (row,) = listed["data"]
        assert is_described(name, row)


def test_an_account_and_a_model_are_described() -> None:
    owing = pb.Balance(granted_micros=-1, credit_limit_micros=5)
    for balance in (pb.Balance(), owing):
        account = pb.Account(mode=Mode.MODE_LIVE, balance=balance)
        assert is_described("Account", json.loads(render_account(account)))
    model = Model(id="m", task_type=TaskType.TASK_TYPE_TEXT)
    model.prices.add(unit=PriceUnit.PRICE_UNIT_IMAGE, amount_micros=1_500_000)
    model.price_tiers.add(min_input_tokens=5, prices=model.prices)
    value = render_model(model)
    assert is_described("Model", value)
    assert set(SCHEMAS["Model"]["properties"]["price_tiers"]["items"]["required"]) == set(
        value["price_tiers"][0]
    )


@pytest.mark.parametrize("task_format", TASK_FORMATS.values(), ids=lambda each: each.name)
def test_a_task_has_no_unknown_field(task_format: TaskFormat) -> None:
    # Null would be accepted, but types in TypeScript can't say so: every property would have to be null.
    assert (
        SCHEMAS[task_format.schema_name]["additionalProperties"]
        is SCHEMAS["Form"]["additionalProperties"]
        is False
    )


def test_every_header_of_a_call_is_described() -> None:
    limits = {
        f"x-ratelimit-{part}{counter}"
        for part in ("limit", "remaining", "reset")
        for counter in ("", "-tokens", "-concurrent")
    } - {"x-ratelimit-reset-concurrent"}
    named = {header_name(key) for key in HEADERS | limits}
    assert named | {"Retry-After", "WWW-Authenticate"} <= set(RESPONSE_HEADERS)


def test_the_pieces_of_a_tool_call_are_described() -> None:
    objects = StreamObjects(TaskStarted(id="task_1", model="gpt-4"))
    for delta in (ToolCallDelta(id="call_1", name="f"), ToolCallDelta(arguments_json="{}")):
        for piece in render_tool_call(objects, delta):
            assert is_described("TaskCompletionChunk", json.loads(piece))


@pytest.mark.parametrize(
    ("text", "valid"), [("12", True), ("0.000001", True), ("-1", False), ("1.0000001", False)]
)
def test_credits_in_headers_are_decimals_of_six_places(text: str, valid: bool) -> None:
    schema = RESPONSE_HEADERS["X-Credits-Remaining"]["schema"]
    assert jsonschema_rs.is_valid(schema, text) is valid
