"""The built-in providers as subjects of the suite, with short waits where a vendor is asked again and again."""

from __future__ import annotations

from decimal import Decimal
from functools import partial

from pomelo.catalog.catalog import Limits, Route
from pomelo.providers.anthropic import Anthropic
from pomelo.providers.bfl import BFL
from pomelo.providers.chat.compatible import Compatible, host
from pomelo.providers.chat.mistral import Mistral
from pomelo.providers.chat.openai import OpenAI
from pomelo.providers.elevenlabs.elevenlabs import ElevenLabs
from pomelo.providers.replicate import Replicate
from pomelo.providers.together import Together
from pomelo.testing import (
    anthropic_protocol,
    bfl_protocol,
    elevenlabs_protocol,
    mistral_protocol,
    openai_protocol,
    replicate_protocol,
    together_protocol,
)
from pomelo.testing.suite import Subject, sample

SUBJECTS = (
    Subject(
        "openai",
        OpenAI,
        lambda upstream: upstream.openai_base_url,
        openai_protocol.PROTOCOL,
        (sample("text", Route("openai", "gpt-4.1")),),
    ),
    Subject(
        "anthropic",
        Anthropic,
        lambda upstream: upstream.anthropic_base_url,
        anthropic_protocol.PROTOCOL,
        (sample("text", Route("anthropic", "claude-haiku-4-5")),),
    ),
    Subject(
        "anthropic, long answers",  # asked for as a stream, whatever the caller wants
        Anthropic,
        lambda upstream: upstream.anthropic_base_url,
        anthropic_protocol.PROTOCOL,
        (sample("text", Route("anthropic", "claude-haiku-4-5"), limits=Limits(max_output_tokens=64_000)),),
    ),
    Subject(
        "mistral",
        Mistral,
        lambda upstream: upstream.mistral_base_url,
        mistral_protocol.PROTOCOL,
        (sample("text", Route("mistral", "mistral-small-latest")),),
    ),
    Subject(
        "a compatible host",
        lambda credentials, http: Compatible(credentials, http, host("ahost", {})),
        lambda upstream: upstream.openai_base_url,
        openai_protocol.PROTOCOL,
        (sample("text", Route("ahost", "mixtral:8x7b")),),
    ),
    Subject(
        "bfl",
        partial(BFL, interval=0.001, grace=0.02),
        lambda upstream: upstream.bfl_base_url,
        bfl_protocol.PROTOCOL,
        (sample("image", Route("bfl", "flux-dev")),),
        cost=Decimal("0.04"),
    ),
    Subject(
        "together",
        Together,
        lambda upstream: upstream.together_base_url,
        together_protocol.PROTOCOL,
        (sample("image", Route("together", "black-forest-labs/FLUX.1-schnell")),),
    ),
    Subject(
        "replicate",
        partial(Replicate, interval=0.001, grace=0.02),
        lambda upstream: upstream.replicate_base_url,
        replicate_protocol.PROTOCOL,
        (sample("image", Route("replicate", "black-forest-labs/flux-schnell")),),
    ),
    Subject(
        "elevenlabs",
        partial(ElevenLabs, max_audio_bytes=4 * 1024 * 1024),
        lambda upstream: upstream.elevenlabs_base_url,
        elevenlabs_protocol.PROTOCOL,
        (
            sample("text_to_speech", Route("elevenlabs", "eleven_flash_v2_5")),
            sample("speech_to_speech", Route("elevenlabs", "eleven_multilingual_sts_v2")),
            sample("speech_to_text", Route("elevenlabs", "scribe_v2")),
        ),
    ),
)
