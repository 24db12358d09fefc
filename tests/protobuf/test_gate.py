"""`make breaking` refuses what breaks code generated from the last release, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.protobuf.contract import Contract

TASK = "pomelo/v1/task.proto"
TASK_SERVICE = "pomelo/v1/task_service.proto"
TEXT = "pomelo/v1/text.proto"
IMAGE = "pomelo/v1/image.proto"
MEDIA = "pomelo/v1/media.proto"
TOP_P = "  optional double top_p = 4;\n"
SYSTEM = "  ROLE_SYSTEM = 1;\n"
TOOL_RESULT = "    ToolResult tool_result = 4;\n"

Change = Callable[[Contract], None]


@pytest.fixture
def contract(tmp_path: Path) -> Contract:
    """The project's protobuf files as the release v0.1.0."""
    contract = Contract(tmp_path)
    contract.release("v0.1.0")
    return contract


def replace(name: str, old: str, new: str) -> Change:
    return lambda contract: contract.replace(name, old, new)


def add_a_field(contract: Contract) -> None:
    head = "message ImageProgress {\n"
    contract.replace(IMAGE, head, f"{head}  // Seconds left.\n  double seconds_left = 15;\n")


def move_a_message(contract: Contract) -> None:
    contract.write(TASK, f"{contract.read(TASK)}\n{contract.cut(IMAGE, 'message ImageProgress')}")


def rename_a_file(contract: Contract) -> None:
    (contract.protos / IMAGE).rename(contract.protos / "pomelo/v1/picture.proto")
    contract.replace(TASK, IMAGE, "pomelo/v1/picture.proto")


def test_unchanged_files_pass(contract: Contract) -> None:
    assert contract.make("breaking") == (True, "buf breaking --against v0.1.0\n")


@pytest.mark.parametrize(
    "change",
    [
        add_a_field,
        replace(TEXT, SYSTEM, f"{SYSTEM}  ROLE_OTHER = 9;\n"),
        replace(TEXT, "    ImagePart image = 2;\n", "    ImagePart image = 2;\n    string other = 9;\n"),
        replace(IMAGE, "message ImageProgress {", "message Fresh {}\n\nmessage ImageProgress {"),
        replace(TEXT, TOP_P, TOP_P.replace(";", " [deprecated = true];")),
        replace(TEXT, "// Nucleus sampling", "// Top-p sampling"),
    ],
    ids=["field", "enum value", "arm of a oneof", "message", "deprecation", "comment"],
)
def test_additions_deprecations_and_comments_pass(change: Change, contract: Contract) -> None:
    change(contract)
    passed, output = contract.make("breaking")
    assert passed, output


BREAKING: dict[str, tuple[Change, str]] = {
    "a removed field": (
        replace(TEXT, TOP_P, ""),
        'field "4" with name "top_p" on message "TextInput" was deleted',
    ),
    "a removed field, reserved": (
        replace(TEXT, TOP_P, '  reserved 4;\n  reserved "top_p";\n'),
        'field "4" with name "top_p" on message "TextInput" was deleted',
    ),
    "a renamed field": (replace(TEXT, " top_p ", " nucleus "), 'changed name from "top_p" to "nucleus"'),
    "another number": (replace(TEXT, "top_p = 4", "top_p = 14"), 'field "4" with name "top_p"'),
    "another type": (replace(TEXT, "double top_p", "float top_p"), 'changed type from "double" to "float"'),
    "a field without presence": (replace(TEXT, TOP_P, "  double top_p = 4;\n"), "changed cardinality"),
    "a field moved into a oneof": (
        replace(MEDIA, "  string content_type = 4;\n", "  oneof type {\n    string content_type = 4;\n  }\n"),
        "moved from outside to inside a oneof",
    ),
    "a field moved out of a oneof": (
        replace(TEXT, TOOL_RESULT + "  }\n", "  }\n" + TOOL_RESULT.removeprefix("  ")),
        "moved from inside to outside a oneof",
    ),
    "a removed enum value": (replace(TEXT, SYSTEM, ""), 'enum value "1" on enum "Role" was deleted'),
    "a removed enum value, reserved": (
        replace(TEXT, SYSTEM, '  reserved 1;\n  reserved "ROLE_SYSTEM";\n'),
        'enum value "1" on enum "Role" was deleted',
    ),
    "a renamed enum value": (replace(TEXT, SYSTEM, "  ROLE_FIRST = 1;\n"), 'changed name from "ROLE_SYSTEM"'),
    "a message moved to another file": (move_a_message, 'message "ImageProgress" was deleted from file'),
    "a renamed file": (rename_a_file, 'file "pomelo/v1/image.proto" was deleted'),
    "a renamed method": (replace(TASK_SERVICE, "rpc RunTask(", "rpc DoTask("), 'RPC "RunTask"'),
    "a stream made one message": (
        replace(TASK_SERVICE, "returns (stream StreamTaskResponse)", "returns (StreamTaskResponse)"),
        "changed from server streaming to server unary",
    ),
    "another go_package": (replace(TEXT, "v1;pomelov1", "v1;pomelo"), 'File option "go_package" changed'),
    "another java_package": (
        replace(TEXT, 'java_package = "pomelo.v1"', 'java_package = "com.pomelo.v1"'),
        'File option "java_package" changed',
    ),
    "all messages in one Java class": (
        replace(TEXT, "option java_multiple_files = true;\n", ""),
        'File option "java_multiple_files" changed',
    ),
    "another C# namespace": (
        replace(TEXT, 'csharp_namespace = "Pomelo.V1"', 'csharp_namespace = "Pomelo"'),
        'File option "csharp_namespace" changed',
    ),
}


@pytest.mark.parametrize(("change", "message"), BREAKING.values(), ids=BREAKING)
def test_changes_that_break_generated_code_fail(change: Change, message: str, contract: Contract) -> None:
    change(contract)
    passed, output = contract.make("breaking")
    assert not passed
    assert message in output


def test_the_last_release_counts(contract: Contract) -> None:
    add_a_field(contract)
    contract.release("v0.2.0")
    contract.replace(IMAGE, "seconds_left", "remaining")
    contract.release("nightly")
    passed, output = contract.make("breaking")
    assert not passed
    assert "--against v0.2.0" in output
    assert 'changed name from "seconds_left" to "remaining"' in output


def test_before_the_first_release_everything_may_change(tmp_path: Path) -> None:
    contract = Contract(tmp_path)
    contract.git("add", "--all")
    contract.git("commit", "--quiet", "--message", "Begin")
    contract.replace(TEXT, TOP_P, "")
    assert contract.make("breaking") == (True, "")


def test_the_project_as_it_is_passes_the_whole_check(contract: Contract) -> None:
    passed, output = contract.make("proto")
    assert passed, output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace(TEXT, TOP_P, ""), '"top_p"'),
        (replace(TEXT, TOP_P, f"  {TOP_P}"), f"+{TOP_P}"),
        (replace(TEXT, SYSTEM, f"{SYSTEM}  // Another.\n  OTHER = 9;\n"), 'should be prefixed with "ROLE_"'),
        (
            replace(TEXT, TOP_P, f"{TOP_P}  string other = 19;\n"),
            'Field "other" should have a non-empty comment',
        ),
    ],
    ids=["gate", "format", "names", "comments"],
)
def test_the_whole_check_includes(change: Change, message: str, contract: Contract) -> None:
    change(contract)
    passed, output = contract.make("proto")
    assert not passed
    assert message in output
