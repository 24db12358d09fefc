"""The fields of a task as the gateway parses them from a body or a form."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.parsing.task import build_task
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskSpec, TaskType

TEXT, IMAGE, TTS = TaskType.TASK_TYPE_TEXT, TaskType.TASK_TYPE_IMAGE, TaskType.TASK_TYPE_TEXT_TO_SPEECH
STS, STT = TaskType.TASK_TYPE_SPEECH_TO_SPEECH, TaskType.TASK_TYPE_SPEECH_TO_TEXT
HI = [{"role": "user", "content": "Hi"}]


def build(task_type: int, values: dict[str, Any], *, form: bool = False) -> TaskSpec:
    return build_task("m", task_type, values, form=form).spec


def refusal(task_type: int, values: dict[str, Any], *, form: bool = False) -> PomeloError:
    with pytest.raises(PomeloError) as caught:
        build(task_type, values, form=form)
    return caught.value
