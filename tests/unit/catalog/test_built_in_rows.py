"""The rows of the built-in catalogue equal a second copy of them: a slip in either would bill or send something else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

from pomelo.call import adjusted_header
from pomelo.catalog.catalog import Catalog, Model, Route
from pomelo.catalog.pricing import UnitPrices
from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.gen.v1.speech_pb2 import SpeechToSpeechInput, SpeechToTextInput, TextToSpeechInput, VoiceSettings
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.text_pb2 import REASONING_EFFORT_MINIMAL, REASONING_EFFORT_XHIGH, TextInput
from pomelo.money import format_credits
from pomelo.protobuf.enums import enum_names
from pomelo.providers.fitting import Given, fit

MODELS = list(Catalog.load().models.values())
UNITS = enum_names(PriceUnit.DESCRIPTOR)
TEXT_UNITS = (
    "million_input_tokens",
    "million_cached_input_tokens",
    "million_cache_write_input_tokens",
    "million_cache_write_1h_input_tokens",
    "million_output_tokens",
    "provider_dollar",
)

TEXT_PRICES = """
claude-3-haiku  claude-haiku-4-5                 1    0.1   1.25  2  5    -
claude-3-opus   claude-opus-4-6                  5    0.5   6.25  10 25   -
claude-3-sonnet claude-sonnet-4-6                3    0.3   3.75  6  15   -
gpt-3.5-turbo   gpt-6-luna                       0.1  0.01  0.125 -  0.5  -
gpt-3.5-turbo   from-272001                      0.2  0.02  0.25  -  0.75 -
gpt-4           gpt-5.6-sol                      4    0.4   5     -  20   -
gpt-4           from-272001                      8    0.8   10    -  30   -
gpt-4-turbo     gpt-5.6-sol                      4    0.4   5     -  20   -
gpt-4-turbo     from-272001                      8    0.8   10    -  30   -
mixtral-8x22b   mistral-small-latest             0.15 0.015 -     -  0.6  -
mixtral-8x22b   mistralai/mixtral-8x22b-instruct 2    0.2   -     -  6    1
mixtral-8x7b    mistral-small-latest             0.15 0.015 -     -  0.6  -
mixtral-8x7b    mistralai/mixtral-8x7b-instruct  0.54 -     -     -  0.54 1
"""
"""In the columns TEXT_UNITS; of a tier, the tokens of input from which it applies."""

MEDIA_PRICES = """
eleven-labs-sts eleven_multilingual_sts_v2       audio_minute        0.12
eleven-labs-stt scribe_v2                        audio_hour          0.22
eleven-labs-tts eleven_multilingual_v2           thousand_characters 0.08
flux-1-dev      flux-dev                         image               0.025
flux-1-pro      flux-pro-1.1                     image               0.04
flux-1-schnell  black-forest-labs/FLUX.1-schnell megapixel           0.003
flux-1-schnell  black-forest-labs/flux-schnell   image               0.003
"""

LIMITS = """
claude-3-haiku  200000  64000  0     0
claude-3-opus   1000000 128000 0     0
claude-3-sonnet 1000000 128000 0     0
eleven-labs-sts 0       0      0     300
eleven-labs-stt 0       0      0     36000
eleven-labs-tts 0       0      10000 0
flux-1-dev      0       0      10000 0
flux-1-pro      0       0      10000 0
flux-1-schnell  0       0      10000 0
gpt-3.5-turbo   922000  128000 0     0
gpt-4           922000  128000 0     0
gpt-4-turbo     922000  128000 0     0
mixtral-8x22b   262144  32768  0     0
mixtral-8x7b    262144  32768  0     0
"""
"""Tokens of input and of output, characters, and seconds of audio."""

VOICE = VoiceSettings(stability=1, similarity_boost=1, style=1, use_speaker_boost=True, speed=4)
LARGEST: dict[int, Any] = {
    TaskType.TASK_TYPE_TEXT: TextInput(
        max_tokens=2**31 - 1,
        temperature=2,
        top_p=1,
        stop=["a"],
        seed=1,
        presence_penalty=2,
        frequency_penalty=2,
        reasoning_effort=REASONING_EFFORT_XHIGH,
    ),
    TaskType.TASK_TYPE_IMAGE: ImageInput(
        width=2048, height=2048, num_inference_steps=100, guidance_scale=20, seed=1
    ),
    TaskType.TASK_TYPE_TEXT_TO_SPEECH: TextToSpeechInput(voice_settings=VOICE, seed=1, language_code="en"),
    TaskType.TASK_TYPE_SPEECH_TO_SPEECH: SpeechToSpeechInput(voice_settings=VOICE, seed=1),
    TaskType.TASK_TYPE_SPEECH_TO_TEXT: SpeechToTextInput(language_code="en", diarize=True, num_speakers=32),
}
SLOW = VoiceSettings(speed=0.25)
SMALLEST: dict[int, Any] = {
    TaskType.TASK_TYPE_TEXT: TextInput(
        max_tokens=1, temperature=0, reasoning_effort=REASONING_EFFORT_MINIMAL
    ),
    TaskType.TASK_TYPE_IMAGE: ImageInput(width=64, height=79, num_inference_steps=1, guidance_scale=0),
    TaskType.TASK_TYPE_TEXT_TO_SPEECH: TextToSpeechInput(voice_settings=SLOW),
    TaskType.TASK_TYPE_SPEECH_TO_SPEECH: SpeechToSpeechInput(voice_settings=SLOW),
    TaskType.TASK_TYPE_SPEECH_TO_TEXT: SpeechToTextInput(num_speakers=1),
}


def routes() -> Iterator[tuple[Model, Route]]:
    return ((model, route) for model in MODELS for route in model.routes)


def price_rows() -> Iterator[tuple[str, str, UnitPrices]]:
    for model, route in routes():
        prices, _ = model.prices_for(route)
        yield model.name, route.model, prices.units
        for tokens, units in prices.tiers:
            yield model.name, f"from-{tokens}", units


def in_columns(units: UnitPrices) -> Iterator[str]:
    """The prices of a text, or the units and prices of a task of another type."""
    named = {UNITS[unit]: format_credits(micros) for unit, micros in units.items()}
    if "million_output_tokens" in named:
        yield from (named.pop(unit, "-") for unit in TEXT_UNITS)
    for unit, price in named.items():
        yield from (unit, price)


def test_the_prices_of_every_route_and_tier_are_the_vendors() -> None:
    found = sorted([name, vendors, *in_columns(units)] for name, vendors, units in price_rows())
    lines = (TEXT_PRICES + MEDIA_PRICES).splitlines()
    assert found == sorted(line.split() for line in lines if line)


def test_the_limits_of_every_model_are_the_vendors() -> None:
    found = [[model.name, *map(str, astuple(model.limits))] for model in MODELS]
    assert found == [line.split() for line in LIMITS.splitlines()[1:]]


def test_every_model_is_also_found_by_its_vendors_name() -> None:
    vendors = {route.model for _, route in routes() if route.provider != "openrouter"}
    assert {alias for model in MODELS for alias in model.aliases} == vendors


def test_what_a_vendors_model_does_not_take_is_adjusted() -> None:
    found = {
        (model.name, route.provider): [
            adjusted_header(fit(Given(given[model.task_type], "ann"), model, route).adjustments)
            for given in (LARGEST, SMALLEST)
        ]
        for model, route in routes()
    }
    claude = "seed; presence_penalty; frequency_penalty; max_tokens={}; temperature=1; reasoning_effort={}"
    gpt = ["stop; presence_penalty; frequency_penalty; max_tokens=128000", "reasoning_effort=none"]
    mistral = [
        "user; max_tokens=32768; temperature=1.5; reasoning_effort=high",
        "user; reasoning_effort=none",
    ]
    openrouter = ["reasoning_effort; max_tokens=16384", "reasoning_effort"]
    speed = ["voice_settings.speed=1.2", "voice_settings.speed=0.7"]
    assert found == {
        ("claude-3-haiku", "anthropic"): [claude.format(64000, "none"), "reasoning_effort=none"],
        ("claude-3-opus", "anthropic"): [claude.format(128000, "high"), "reasoning_effort=none"],
        ("claude-3-sonnet", "anthropic"): [claude.format(128000, "high"), "reasoning_effort=none"],
        ("gpt-3.5-turbo", "openai"): gpt,
        ("gpt-4", "openai"): gpt,
        ("gpt-4-turbo", "openai"): gpt,
        ("mixtral-8x22b", "mistral"): mistral,
        ("mixtral-8x22b", "openrouter"): openrouter,
        ("mixtral-8x7b", "mistral"): mistral,
        ("mixtral-8x7b", "openrouter"): openrouter,
        ("flux-1-dev", "bfl"): [
            "width=1440; height=1440; num_inference_steps=50; guidance_scale=5",
            "width=256; height=256; guidance_scale=1.5",
        ],
        ("flux-1-pro", "bfl"): [
            "num_inference_steps; guidance_scale; width=1440; height=1440",
            "num_inference_steps; guidance_scale; width=256; height=256",
        ],
        ("flux-1-schnell", "together"): [
            "guidance_scale; width=1440; height=1440; num_inference_steps=4",
            "guidance_scale; width=256; height=256",
        ],
        ("flux-1-schnell", "replicate"): ["guidance_scale; num_inference_steps=4", "guidance_scale"],
        ("eleven-labs-sts", "elevenlabs"): speed,
        ("eleven-labs-stt", "elevenlabs"): ["", ""],
        ("eleven-labs-tts", "elevenlabs"): ["language_code; " + speed[0], speed[1]],
    }


def test_every_route_and_host_has_the_options_of_its_vendor() -> None:
    sol = {
        "max_tokens_field": "max_completion_tokens",
        "reasoning_effort": "none",
        "reasoning_excludes": ["tools", "temperature", "top_p"],
    }
    assert {model.name: route.options for model, route in routes() if route.options} == {
        **dict.fromkeys(("gpt-3.5-turbo", "gpt-4", "gpt-4-turbo"), sol),
        **{name: {"thinking": "adaptive"} for name in ("claude-3-opus", "claude-3-sonnet")},
        "mixtral-8x7b": {"context_tokens": 32_768},
        "mixtral-8x22b": {"context_tokens": 65_536},
    }
    assert Catalog.load().hosts == {
        "together-chat": {
            "base_url": "https://api.together.ai/v1",
            "credentials": "together",
            "user_field": "none",
            "stream_usage": "always",
        },
        "openrouter": {"base_url": "https://openrouter.ai/api/v1", "reports_cost": True},
        "groq": {
            "base_url": "https://api.groq.com/openai/v1",
            "stream_usage": "always",
            "drop": ["presence_penalty", "frequency_penalty"],
        },
        "fireworks": {"base_url": "https://api.fireworks.ai/inference/v1"},
        "vllm": {"key_needed": False},
        "ollama": {"key_needed": False, "patient": True},
    }
