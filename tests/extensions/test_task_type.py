"""A task type is added in files of its own, a row in each table, and a method in the providers that support it."""

from __future__ import annotations

from pathlib import Path

from tests.extensions.checkout import Checkout

PROTO = "proto/pomelo/v1/task.proto"
ADDITIONS = (
    (PROTO, 'import "pomelo/v1/image.proto";', 'import "pomelo/v1/moderation.proto";'),
    (PROTO, "TASK_TYPE_SPEECH_TO_TEXT = 5;", "  // A judgement of a text.\n  TASK_TYPE_MODERATION = 6;"),
    (
        PROTO,
        "SpeechToTextInput speech_to_text = 6;",
        "    // For moderation models.\n    ModerationInput moderation = 7;",
    ),
    (
        PROTO,
        "Transcription transcription = 7;",
        "    // Of moderation models.\n    ModerationOutput moderation = 8;",
    ),
    (
        "pomelo/catalog/task_types.py",
        "TASK_TYPE_ROWS: Mapping[str, TaskTypeRow] = {",
        """\
    "moderation": TaskTypeRow(
        limits=("max_characters",),
        price_units=("thousand_characters",),
        price_example='price = { thousand_characters = "0.01" }',
        events=frozenset({"completed"}),
        output="moderation",
    ),""",
    ),
    (
        "pomelo/fields.py",
        '"""The fields that text-to-speech and speech-to-speech share."""',
        '\nMODERATION_FIELDS: Rules = {"text": CHARACTERS}',
    ),
    (
        "pomelo/tasks/__init__.py",
        "from pomelo.tasks.base import TaskDefinition",
        "from pomelo.tasks import moderation",
    ),
    (
        "pomelo/tasks/__init__.py",
        "TaskType.TASK_TYPE_TEXT: text.DEFINITION,",
        "    TaskType.TASK_TYPE_MODERATION: moderation.DEFINITION,",
    ),
    (
        "gateway/types/__init__.py",
        "from gateway.types.base import Link, StreamObjects, TaskFormat",
        "from gateway.types import moderation",
    ),
    (
        "gateway/types/__init__.py",
        "TaskType.TASK_TYPE_TEXT: text.FORMAT,",
        "    TaskType.TASK_TYPE_MODERATION: moderation.FORMAT,",
    ),
    (
        "pomelo/providers/chat/openai.py",
        'base_url = "https://api.openai.com/v1"',
        """
    async def moderation(self, job: Job[ModerationInput]) -> AsyncGenerator[Event, None]:
        body = to_json({"input": job.input.text, "model": job.route.model})
        url = self._url.parent.parent / "moderations"
        answer = await self._http.request_json(url, self._json_headers, body, self._error_mapping)
        event = Event()
        event.completed.moderation.flagged = answer["results"][0]["flagged"]
        yield event""",
    ),
    (
        "pomelo/providers/chat/openai.py",
        "from __future__ import annotations",
        """
from pydantic_core import to_json

from pomelo.providers.base import Event""",
    ),
    (
        "pomelo/providers/sandbox/provider.py",
        "self._threads.shutdown(wait=False, cancel_futures=True)",
        """
    async def moderation(self, job: Job[Any]) -> AsyncGenerator[Event, None]:
        event = Event()
        event.completed.moderation.flagged = "bomb" in job.input.text
        yield event""",
    ),
)


def test_an_added_task_type_works_over_every_protocol(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    checkout.add_files("task_type")
    for path, anchor, lines in ADDITIONS:
        checkout.add_after(path, anchor, lines)
    checkout.generate()
    checkout.pytest("tests/check_moderation.py")
    assert checkout.additions() == {
        "gateway/types/__init__.py": 2,
        "gateway/types/moderation.py": "new",
        "pomelo/catalog/task_types.py": 7,
        "pomelo/fields.py": 2,
        "pomelo/providers/chat/openai.py": 12,
        "pomelo/providers/sandbox/provider.py": 5,
        "pomelo/tasks/__init__.py": 2,
        "pomelo/tasks/moderation.py": "new",
        "proto/pomelo/v1/moderation.proto": "new",
        "proto/pomelo/v1/task.proto": 7,
    }
