"""Two servers with one Redis store and one bucket, as on two machines, and what is left when one is killed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.speech_pb2 import SpeechToTextInput
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.calls import bearer, upload_messages
from tests.integration.commands import pomelo_json
from tests.integration.test_grpc_media import silent_wav
from tests.redis_server import RedisServer
from tests.s3_server import any_server
from tests.serving import Served, serve
from tests.tasks import TASK_BODIES, text_body

IMAGE = {**TASK_BODIES["image"], "response_format": "url"}
SPEECH = {**TASK_BODIES["tts"], "response_format": "url", "output_format": "pcm_16000"}


class Fleet:
    """The two servers, and a session for both."""

    def __init__(
        self, servers: list[Served], shared: Mapping[str, str], session: aiohttp.ClientSession
    ) -> None:
        self.servers = servers
        self.shared = shared
        self.session = session
        self.headers = servers[0].headers  # every server accepts every key

    async def task(self, server: Served, body: Mapping[str, Any], **headers: str) -> Any:
        sent = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        async with self.session.post(f"{server.url}/api/v1/task", json=body, headers=sent) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json(), dict(answer.headers)

    async def get(self, server: Served, path: str, **headers: str) -> bytes:
        async with self.session.get(server.url + path, headers=headers) as answer:
            assert answer.status in (200, 206), await answer.text()
            return await answer.read()

    async def doctor(self) -> dict[str, str]:
        """What `pomelo doctor --fleet` finds: all is well."""
        found = await pomelo_json(self.servers[1].data.parent, "doctor", "--fleet", **self.shared)
        assert {row["state"] for row in found} == {"ok"}
        return {row["name"]: row["detail"] for row in found}

    async def get_json(self, server: Served, path: str) -> Any:
        async with self.session.get(server.url + path, headers=self.headers) as answer:
            assert answer.status == 200, await answer.text()
            return json.loads(await answer.text(), parse_float=Decimal)


def path_of(url: str) -> str:
    """The path and the query of a link, which all servers answer."""
    return url[url.index("/media/") :]


@pytest.fixture(name="fleet")
async def _fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    bucket = any_server()
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        shared = {
            **bucket.variables,
            "POMELO_STORE": redis.url,
            "POMELO_ARCHIVE": f"sqlite:{tmp_path / 'usage.db'}",
            "POMELO_MEDIA": bucket.new_bucket(),
            "POMELO_SECRET": "the same secret on all of the machines",
        }
        servers: list[Served] = []
        for name in ("a", "b"):
            (tmp_path / name / "data").mkdir(mode=0o700, parents=True)
            if servers:  # only the first server of an empty store makes a key
                shutil.copy(servers[0].data / "test-key", tmp_path / name / "data")
            servers.append(await stack.enter_async_context(serve(tmp_path / name, **shared)))
        yield Fleet(servers, shared, await stack.enter_async_context(aiohttp.ClientSession()))


async def use(server: Served, key: str, media_id: str) -> str:
    """Transcribes an upload; returns the text."""
    spec = TaskSpec(
        model="eleven-labs-stt", speech_to_text=SpeechToTextInput(audio=MediaSource(media_id=media_id))
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        response = await TaskServiceStub(channel).RunTask(RunTaskRequest(spec=spec), metadata=bearer(key))
    text: str = response.result.transcription.text
    return text


async def upload(server: Served, key: str, data: bytes) -> str:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        response = await MediaServiceStub(channel).UploadMedia(
            iter(upload_messages(data, "audio/wav")), metadata=bearer(key)
        )
    media_id: str = response.media.id
    return media_id


async def test_two_servers_serve_each_others_media_and_answers_and_lose_nothing_when_one_is_killed(
    fleet: Fleet,
) -> None:
    first, second = fleet.servers
    key = fleet.headers["Authorization"].removeprefix("Bearer ")
    links = []
    for server, other in ((first, second), (second, first)):
        image, _ = await fleet.task(server, IMAGE)
        links.append(path_of(image["data"][0]["url"]))
        picture = await fleet.get(other, links[-1])
        assert picture.startswith(b"\x89PNG")
        assert await fleet.get(other, links[-1], Range="bytes=1-3") == b"PNG"
        uploaded = await upload(server, key, silent_wav(20))
        assert await use(other, key, uploaded) == await use(server, key, uploaded)
        speech, _ = await fleet.task(server, SPEECH, Idempotency_Key=server.url)
        again, headers = await fleet.task(other, SPEECH, Idempotency_Key=server.url)
        assert headers["Idempotent-Replayed"] == "true"
        assert again["id"] == speech["id"]
        links += [path_of(speech["audio"]["url"]), path_of(again["audio"]["url"])]
        assert await fleet.get(server, links[-1]) == await fleet.get(other, links[-2])
    assert (await fleet.doctor())["processes"].startswith("2 on 1 host")
    assert [list((server.data / "media").iterdir()) for server in fleet.servers] == [[], []]

    async with fleet.session.post(
        f"{first.url}/api/v1/task",
        json=text_body("one two three four five six [[pace:0.5]]", stream=True),
        headers=fleet.headers,
    ) as stream:
        assert (await stream.content.readline()).startswith(b"data: ")
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            await stream.read()

    for link in links:
        assert await fleet.get(second, link)
    assert Decimal((await fleet.get_json(second, "/api/v1/account"))["credits"]["held"]) > 0
    async with asyncio.timeout(60):  # the lease of the killed server's task ends within 30 s
        while Decimal((await fleet.get_json(second, "/api/v1/account"))["credits"]["held"]):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    assert (await fleet.doctor())["processes"].startswith("1 on 1 host")
    usage = await fleet.get_json(second, "/api/v1/usage?page_size=100")
    assert len(usage["data"]) in (8, 9)  # with what was noted of the killed stream, if any
    spent = sum(Decimal(str(record["cost"])) for record in usage["data"])
    assert Decimal((await fleet.get_json(second, "/api/v1/account"))["credits"]["spent"]) == spent
