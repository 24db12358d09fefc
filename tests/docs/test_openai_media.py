"""Runs every runnable block of docs/openai-media.md, in their order, with only the host and the key replaced."""

from __future__ import annotations

import re
from pathlib import Path

import aiohttp
import av

from pomelo.providers.elevenlabs.voices import OPENAI_VOICES
from tests.docs.test_examples import run
from tests.serving import serve

PAGE = (Path(__file__).parents[2] / "docs" / "openai-media.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.DOTALL)


async def test_the_examples_make_a_link_audio_and_captions(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        printed = []
        for language, code in BLOCKS:  # some of them read the file that one before them has written
            code = code.replace("https://your-domain.com", served.url).replace("YOUR_API_KEY", served.key)
            printed.append(await run(language, code, tmp_path))
            if "audio/speech" in code or "audio.speech" in code:
                with av.open(str(tmp_path / "speech.mp3"), "r") as audio:
                    assert sum(frame.samples for frame in audio.decode(audio=0)) > 10_000
        link, _, _, vtt, srt = printed
        async with aiohttp.ClientSession() as session, session.get(link.strip()) as answer:
            assert answer.content_type == "image/png"
        assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> ")
        assert srt.startswith("1\n00:00:00,000 --> ")
        assert vtt.count("Straight into a file.") == srt.count("Straight into a file.") == 1


def test_the_page_lists_the_voices_that_stand_in_for_openais() -> None:
    rows = re.findall(r"`(\w+)` \| ([A-Z]\w+)(?= \|)", PAGE)
    assert {name: stand_in.lower() for name, stand_in in rows} == OPENAI_VOICES
