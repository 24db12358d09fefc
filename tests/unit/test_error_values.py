"""The values of errors: error_reason.proto lists exactly the keys that the code sets, by reason."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from pomelo.errors import TABLE, PomeloError, invalid, missing, model_not_found, unsupported_model

ROOT = Path(__file__).parents[2]
PROTO = (ROOT / "proto/pomelo/v1/error_reason.proto").read_text()

LIMIT = {"quota", "limit"}
COMPUTED: dict[str, dict[str, set[str]]] = {
    "accounts/budgets.py": {
        "insufficient_credits": {"requiredMicros", "budgetMicros", "period", "resetTime"},
    },
    "errors.py": {"invalid_parameter": {"field", "expected", "minimum", "maximum"}},
    "engine/limits.py": {
        "rate_limit_exceeded": LIMIT | {"resetTime"},
        "concurrency_limit_exceeded": LIMIT,
        "token_limit_exceeded": LIMIT | {"model", "requested", "resetTime"},
    },
    "media/data_uris.py": {"invalid_parameter": {"field", "character", "maxCharacters"}},
    "providers/http/errors.py": {"invalid_parameter": {"field"}},
    "providers/sandbox/triggers.py": {
        "context_length_exceeded": {"field"},
        "content_policy_violation": {"field"},
        "model_not_allowed": {"field", "model"},
        "rate_limit_exceeded": {"resetTime"},
    },
    "server/call_limits.py": {"deadline_exceeded": {"timeoutSeconds"}},
    # They pass on errors that were raised elsewhere.
    "providers/guard.py": {},
    "status.py": {},
}
"""What can't be read from the source, because the code or the keys of an error are computed: by file."""


def documented() -> dict[str, set[str]]:
    """The keys by code, from the comment of each reason."""
    found = re.findall(r"((?:  //.*\n)+)  ERROR_REASON_(\w+) = \d+;", PROTO)
    return {name.lower(): listed(comment) for comment, name in found if name != "UNSPECIFIED"}


def listed(comment: str) -> set[str]:
    match = re.search(r"^  // Metadata: ([\w, ]+)\.$", comment, re.MULTILINE)
    if match is None:
        assert "Metadata" not in comment
        return set()
    keys = match[1].split(", ")
    assert keys == sorted(set(keys)), "in order, each once"
    return set(keys)


def errors_in(source: str) -> Iterator[tuple[str | None, set[str] | None]]:
    """The code and the keys of each error that a module makes with a field or with values; None for what is
    computed."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        if name == "missing":
            yield "missing_parameter", {"field"}
        elif name == "invalid":
            yield "invalid_parameter", {"field", "expected", *given}
        elif name in ("PomeloError", "UpstreamError") and given.keys() & {"field", "values"}:
            code = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            yield code if isinstance(code, str) else None, keys_of(given)


def keys_of(given: dict[str, ast.expr]) -> set[str] | None:
    keys = {"field"} if "field" in given else set()
    values = given.get("values")
    if values is None:
        return keys
    if not isinstance(values, ast.Dict):
        return None
    for key in values.keys:
        assert isinstance(key, ast.Constant)
        keys.add(str(key.value))
    return keys


def test_each_reason_lists_exactly_the_keys_that_the_code_sets() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    computed = set()
    for path in sorted((ROOT / "pomelo").rglob("*.py")):
        name = path.relative_to(ROOT / "pomelo").as_posix()
        if name.startswith(("gen/", "testing/")):
            continue
        for code, keys in errors_in(path.read_text()):
            if code is None or keys is None:
                computed.add(name)
            else:
                found[code] |= keys
    assert computed == set(COMPUTED)
    for by_code in COMPUTED.values():
        for code, keys in by_code.items():
            found[code] |= keys
    assert {code: keys for code, keys in documented().items() if keys} == found


def test_every_error_is_documented_and_every_key_explained_once() -> None:
    assert documented().keys() == TABLE.keys()
    explained = [
        key
        for line in re.findall(r"^// - ((?:`\w+`(?:, )?)+): ", PROTO, re.MULTILINE)
        for key in line.split(", ")
    ]
    assert len(explained) == len(set(explained))
    assert {key.strip("`") for key in explained} == set().union(*documented().values())


def test_keys_have_the_form_that_error_info_requires() -> None:
    for key in set().union(*documented().values()):
        assert re.fullmatch(r"[a-z][a-zA-Z0-9]{0,63}", key)


@pytest.mark.parametrize(
    ("error", "values"),
    [
        (PomeloError("invalid_body"), {}),
        (missing("model"), {}),
        (invalid("stop", "a text"), {"expected": "a text"}),
        (invalid("n", "1 to 2", minimum=1, maximum=2.5), {"expected": "1 to 2", "minimum": "1", "maximum": "2.5"}),
        (invalid("n", "0 or more", minimum=0), {"expected": "0 or more", "minimum": "0"}),
        (invalid("n", "0 or less", maximum=0), {"expected": "0 or less", "maximum": "0"}),
        (unsupported_model("gpt-99"), {"model": "gpt-99"}),
        (model_not_found("x" * 101), {"model": "x" * 100 + "…"}),
    ],
)  # fmt: skip
def test_the_values_of_an_error_are_text(error: PomeloError, values: dict[str, str]) -> None:
    assert error.values == values


def test_the_values_of_an_error_can_t_be_changed() -> None:
    given = {"limit": 20}
    for error in (PomeloError("rate_limit_exceeded", values=given), PomeloError("rate_limit_exceeded")):
        before = dict(error.values)
        given["limit"] = 30
        with pytest.raises(TypeError):
            error.values["limit"] = "30"  # type: ignore[index]
        assert error.values == before


def test_a_model_that_is_not_found_is_named() -> None:
    assert model_not_found("gpt-99").message == "There is no model 'gpt-99'. See ListModels"
