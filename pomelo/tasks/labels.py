"""The labels of a task, which have no effect on its output: the end user's id, and the caller's metadata."""

from __future__ import annotations

from pomelo.errors import invalid
from pomelo.fields import MAX_METADATA_KEY, MAX_METADATA_PAIRS, MAX_METADATA_VALUE, MAX_USER_CHARACTERS
from pomelo.gen.v1.task_pb2 import TaskSpec


def check_labels(spec: TaskSpec) -> None:
    """Refuses a user or metadata that are too long.

    Raises:
        PomeloError: invalid_parameter.
    """
    if len(spec.user) > MAX_USER_CHARACTERS:
        raise invalid("user", f"at most {MAX_USER_CHARACTERS} characters", maximum=MAX_USER_CHARACTERS)
    if not spec.metadata:
        return
    if len(spec.metadata) > MAX_METADATA_PAIRS:
        raise invalid("metadata", f"at most {MAX_METADATA_PAIRS} pairs", maximum=MAX_METADATA_PAIRS)
    # Sorted, so that of two wrong pairs both protocols name the same one: a map has no order.
    for key, value in sorted(spec.metadata.items()):
        if not 0 < len(key) <= MAX_METADATA_KEY or "\0" in key:
            raise invalid(
                "metadata",
                f"pairs whose keys have 1 to {MAX_METADATA_KEY} characters, without NUL",
                minimum=1,
                maximum=MAX_METADATA_KEY,
            )
        if len(value) > MAX_METADATA_VALUE or "\0" in value:
            raise invalid(
                f"metadata.{key}",
                f"text of at most {MAX_METADATA_VALUE} characters, without NUL",
                maximum=MAX_METADATA_VALUE,
            )
