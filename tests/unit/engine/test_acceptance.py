"""What a task becomes when it is accepted, without a provider, a ledger or a demuxer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pomelo.call import Call, Principal
from pomelo.catalog.catalog import Catalog, Model
from pomelo.engine.acceptance import Acceptance
from pomelo.engine.routing import Router
from pomelo.errors import invalid
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.media.audio import AudioSource
from pomelo.media.duration import Measured, Measurer
from pomelo.media.store import MediaStore
from pomelo.tasks.base import LARGE
from tests.calls import call_of
from tests.tasks import small_task, text_task
from tests.unit.refusals import refused

PRINCIPAL = Principal("acme", "key1", live=True)
LIMIT = 1_000


class Access:
    """Lets everyone use all models."""

    def model(self, name: str, principal: Principal) -> Model:
        return Catalog.load().models[name]


class Recording(Measurer):
    """Finds two seconds of FLAC in all audio, and records whose it is."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, str, str]] = []

    async def measure(self, audio: AudioSource, account: str = "", request_id: str = "") -> Measured:
        self.asked.append((audio.size, account, request_id))
        return Measured(2_000, "audio/flac")


@pytest.fixture(name="measurer")
async def _measurer() -> Recording:
    return Recording()


@pytest.fixture(name="acceptance")
def _acceptance(tmp_path: Path, measurer: Recording) -> Acceptance:
    access: Any = Access()
    return Acceptance(
        access=access,
        router=Router({}),
        media=MediaStore(tmp_path / "media", b"s" * 32),
        measurer=measurer,
        inline_limit=LIMIT,
        now=lambda: 1_700_000_000.9,
    )


def call(protocol: str) -> Call:
    made = call_of(None)
    made.protocol, made.request_id = protocol, "req_1"
    return made


def audio_task(data: bytes, content_type: str = "audio/mpeg") -> TaskSpec:
    spec = small_task("speech_to_text")
    spec.speech_to_text.audio.data, spec.speech_to_text.audio.content_type = data, content_type
    return spec


async def test_audio_is_measured_for_its_account_and_has_what_was_found(
    acceptance: Acceptance, measurer: Recording
) -> None:
    spec = audio_task(bytes(77))
    accepted = await acceptance.accept(spec, TaskOptions(), call("rest"), PRINCIPAL, stream=False)
    assert measurer.asked == [(77, "acme", "req_1")]
    audio = accepted.job.audio
    assert audio is not None
    assert (audio.ms, audio.content_type, audio.size, audio.data) == (2_000, "audio/flac", 77, bytes(77))
    assert accepted.estimate.input_audio_ms == 2_000


@pytest.mark.parametrize(
    ("protocol", "size", "accepted"),
    [("grpc", LIMIT, True), ("grpc", LIMIT + 1, False), ("rest", LIMIT + 1, True)],
)
async def test_audio_over_grpc_may_be_inline_up_to_the_limit(
    acceptance: Acceptance, protocol: str, size: int, accepted: bool
) -> None:
    accepting = acceptance.accept(
        audio_task(bytes(size)), TaskOptions(), call(protocol), PRINCIPAL, stream=False
    )
    if accepted:
        assert (await accepting).protocol == protocol
        return
    with refused("payload_too_large", "audio", "^audio is larger than the 1,000 bytes") as error:
        await accepting
    assert error.value.values == {"maxBytes": "1000"}


@pytest.mark.parametrize("size", [1_000, LARGE])
async def test_the_input_of_a_stream_is_counted_before_it_runs(acceptance: Acceptance, size: int) -> None:
    """The progress of all running streams is computed in one step, which must not count their inputs."""
    spec = text_task("a b " * (size // 4))
    accepted = await acceptance.accept(spec, TaskOptions(), call("rest"), PRINCIPAL, stream=True)
    spec.text.Clear()
    assert accepted.estimate.count_input() == size // 2


async def test_an_accepted_task_has_what_its_record_and_its_provider_need(acceptance: Acceptance) -> None:
    spec = text_task("Hello")
    spec.user = "an\0n"
    spec.metadata["team"] = "red"
    own = call("grpc")
    options = TaskOptions(delivery=MediaDelivery.MEDIA_DELIVERY_BOTH)
    accepted = await acceptance.accept(spec, options, own, PRINCIPAL, stream=True)
    assert (accepted.user, accepted.metadata, accepted.created) == (
        "an\ufffdn",
        '{"team":"red"}',
        1_700_000_000,
    )
    assert (accepted.delivery, accepted.principal, accepted.protocol) == (options.delivery, PRINCIPAL, "grpc")
    assert (accepted.candidates, accepted.idempotency_key, accepted.media_bytes) == ((), None, 0)
    job = accepted.job
    assert (job.stream, job.deadline, job.request_id, job.user, job.audio) == (
        *(True, own.deadline, "req_1"),
        *("an\0n", None),
    )
    assert job.task_id.startswith(accepted.definition.id_prefix)
    assert (job.model.name, job.route) == ("gpt-4", job.model.routes[0])


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"model": ""}, "missing_parameter", "model"),
        ({"model": "flux-1-pro"}, "invalid_parameter", "text"),
    ],
)
async def test_a_task_without_its_model_is_refused(
    acceptance: Acceptance, change: dict[str, str], code: str, field: str
) -> None:
    spec = text_task("Hello")
    spec.model = change["model"]
    with refused(code, field) as error:
        await acceptance.accept(spec, TaskOptions(), call("rest"), PRINCIPAL, stream=False)
    if spec.model:
        assert error.value.values == {"model": "flux-1-pro", "taskType": "image"}


@pytest.mark.parametrize("model", ["", "no-such-model", "flux-1-pro"])
async def test_an_invalid_header_is_refused_before_whatever_is_wrong_with_the_task(
    acceptance: Acceptance, model: str
) -> None:
    spec, own = text_task("Hello"), call("grpc")
    spec.model, own.header_error = model, invalid("Prefer", "given once")
    with refused("invalid_parameter", "Prefer"):
        await acceptance.accept(spec, TaskOptions(), own, PRINCIPAL, stream=False)


async def test_an_image_needs_space_if_its_answer_is_stored(acceptance: Acceptance) -> None:
    found = {}
    for name, delivery in (
        ("inline", MediaDelivery.MEDIA_DELIVERY_INLINE),
        ("link", MediaDelivery.MEDIA_DELIVERY_LINK),
    ):
        for key in (None, "k"):
            own = call("rest")
            own.idempotency_key = key
            options = TaskOptions(delivery=delivery)
            accepted = await acceptance.accept(small_task("image"), options, own, PRINCIPAL, stream=False)
            found[name, key] = accepted.media_bytes > 0
            assert (accepted.idempotency_key is None) == (key is None)
    assert found == {
        ("inline", None): False,
        ("inline", "k"): True,
        ("link", None): True,
        ("link", "k"): True,
    }
