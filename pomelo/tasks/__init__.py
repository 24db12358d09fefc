"""The task types, one row each: validation, estimate and output."""

from __future__ import annotations

from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.tasks import image, speech, text, transcription
from pomelo.tasks.base import TaskDefinition

TASK_TYPES: dict[TaskType.ValueType, TaskDefinition] = {
    TaskType.TASK_TYPE_TEXT: text.DEFINITION,
    TaskType.TASK_TYPE_IMAGE: image.DEFINITION,
    TaskType.TASK_TYPE_TEXT_TO_SPEECH: speech.TEXT_TO_SPEECH,
    TaskType.TASK_TYPE_SPEECH_TO_SPEECH: speech.SPEECH_TO_SPEECH,
    TaskType.TASK_TYPE_SPEECH_TO_TEXT: transcription.DEFINITION,
}
