"""The built-in providers as subjects of the suite, with short waits where a vendor is asked again and again."""

from __future__ import annotations

from decimal import Decimal
from functools import partial

from pomelo.catalog.catalog import Limits, Route
from pomelo.providers.bfl import BFL
from pomelo.providers.elevenlabs.elevenlabs import ElevenLabs
from pomelo.providers.replicate import Replicate
from pomelo.providers.together import Together
from pomelo.testing import (
    bfl_protocol,
    elevenlabs_protocol,
    replicate_protocol,
    together_protocol,
)
from pomelo.testing.suite import Subject, sample
from tests.providers.rig import base_url
from tests.providers.text_rig import VENDORS

SUBJECTS = (
    *(
        Subject(
            vendor.name,
            vendor.make,
            partial(base_url, vendor=vendor.server),
            vendor.protocol.PROTOCOL,
            (sample("text", vendor.route, limits=Limits(max_output_tokens=vendor.max_output_tokens)),),
        )
        for vendor in VENDORS
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
