"""An input as a route takes it, and what is reported of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from pomelo.call import adjusted_header
from pomelo.catalog.catalog import Limits, Model, Route
from pomelo.catalog.pricing import Prices
from pomelo.gen.v1.image_pb2 import ImageFormat, ImageInput
from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, TextToSpeechInput, VoiceSettings
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.text_pb2 import (
    REASONING_EFFORT_HIGH,
    REASONING_EFFORT_LOW,
    REASONING_EFFORT_MAX,
    REASONING_EFFORT_MEDIUM,
    REASONING_EFFORT_MINIMAL,
    REASONING_EFFORT_NONE,
    ContentPart,
    Message,
    ReasoningEffort,
    Role,
    TextFormat,
    TextInput,
    Tool,
    ToolChoice,
)
from pomelo.providers.base import Job, fit_job
from pomelo.providers.fitting import Fitting, Given, Hook, fit

MESSAGES = [Message(role=Role.ROLE_USER, content=[ContentPart(text="Hi")])]


def fit_input(
    original: Any,
    hook: Hook | None = None,
    max_tokens: int | None = None,
    limit: int = 0,
    drop: Collection[str] = (),
    user: str = "",
    **route: Any,
) -> Fitting:
    """`original` on a route with such a row; `limit` is the model's maximum of tokens, `max_tokens` what is reserved,
    `user` the end user's id."""
    made = Route("p", "m", drop=frozenset(drop), **route)
    model = Model("x", TaskType.TASK_TYPE_TEXT, (made,), Limits(max_output_tokens=limit), Prices(), "test")
    return fit(Given(original, user), model, made, hook, max_tokens)


def test_an_input_that_fits_is_passed_on_without_a_copy() -> None:
    original = TextInput(messages=MESSAGES, temperature=1, max_tokens=5)
    made = fit_input(original, drop=["seed", "stop"], clamp={"temperature": (0, 1, 0)}, limit=5)
    assert made.input is original
    assert made.adjustments == []


def test_a_parameter_that_was_dropped_is_not_set() -> None:
    def hook(fitting: Fitting) -> None:
        for name in ("stop", "reasoning_effort", "temperature", "user"):
            assert fitting.get(name) is not None
            fitting.drop(name, "left out for a reason")
            assert fitting.get(name) is None
            fitting.drop(name)

    original = TextInput(
        messages=MESSAGES, stop=["a"], reasoning_effort=REASONING_EFFORT_LOW, temperature=0.0
    )
    assert len(fit_input(original, hook, user="me").adjustments) == 4


def test_the_callers_input_is_not_changed() -> None:
    original = TextInput(messages=MESSAGES, temperature=2, stop=["a"])
    before = original.SerializeToString()
    made = fit_input(original, drop=["stop", "user"], clamp={"temperature": (0, 1, 0)}, user="me")
    assert original.SerializeToString() == before
    assert made.user == ""
    assert made.input == TextInput(messages=MESSAGES, temperature=1)
    assert adjusted_header(made.adjustments) == "stop; user; temperature=1"


@pytest.mark.parametrize(
    ("original", "max_tokens", "tokens", "reported"),
    [
        (None, None, None, ""),
        (None, 50, 50, ""),
        (90, None, 90, ""),
        (900, None, 100, "max_tokens=100"),
        (900, 100, 100, "max_tokens=100"),
        (900, 50, 50, "max_tokens=50"),
    ],
)
def test_tokens_are_limited_by_the_model_and_by_what_is_reserved(
    original: int | None, max_tokens: int | None, tokens: int | None, reported: str
) -> None:
    original_input = TextInput(messages=MESSAGES, max_tokens=original)
    made = fit_input(original_input, max_tokens=max_tokens, limit=100)
    assert (made.get("max_tokens"), adjusted_header(made.adjustments)) == (tokens, reported)


def test_a_cap_that_the_caller_did_not_set_is_not_reported_when_it_is_adjusted() -> None:
    original = TextInput(messages=MESSAGES)
    made = fit_input(original, max_tokens=50, limit=100, clamp={"max_tokens": (1, 20, 0)})
    assert (made.get("max_tokens"), made.adjustments) == (20, [])
    made = fit_input(original, max_tokens=50, limit=100, drop=["max_tokens"])
    assert (made.get("max_tokens"), made.adjustments) == (None, [])


def test_no_clamp_raises_a_cap_above_what_is_reserved() -> None:
    made = fit_input(
        TextInput(messages=MESSAGES), max_tokens=50, limit=1000, clamp={"max_tokens": (100, 500, 0)}
    )
    assert (made.get("max_tokens"), made.adjustments) == (50, [])


def test_a_parameter_that_is_dropped_and_clamped_is_dropped() -> None:
    original = TextInput(messages=MESSAGES, temperature=1.5)
    made = fit_input(original, drop=["temperature"], clamp={"temperature": (0, 1, 0)})
    assert adjusted_header(made.adjustments) == "temperature"
    assert not made.input.HasField("temperature")


def test_voice_settings_are_named_with_their_message() -> None:
    original = TextToSpeechInput(voice_settings=VoiceSettings(speed=4, style=0.5, use_speaker_boost=False))
    made = fit_input(original, drop=["style", "use_speaker_boost"], clamp={"speed": (0.7, 1.2, 0)})
    reported = "voice_settings.style; voice_settings.use_speaker_boost; voice_settings.speed=1.2"
    assert adjusted_header(made.adjustments) == reported
    assert made.input.voice_settings == VoiceSettings(speed=1.2)
    made = fit_input(original, drop=["style", "voice_settings"], clamp={"speed": (0.7, 1.2, 0)})
    assert adjusted_header(made.adjustments) == "voice_settings"
    assert not made.input.HasField("voice_settings")


def test_a_change_within_an_object_that_is_left_out_later_is_not_reported() -> None:
    def hook(fitting: Fitting) -> None:
        fitting.drop("style")
        fitting.drop("seed")
        fitting.drop("voice_settings")

    made = fit_input(TextToSpeechInput(seed=1, voice_settings=VoiceSettings(style=0.5)), hook)
    assert adjusted_header(made.adjustments) == "voice_settings; seed"


def test_a_default_is_not_an_adjustment() -> None:
    drop = ["language_code", "diarize", "num_speakers", "timestamps"]
    assert fit_input(SpeechToTextInput(diarize=False), drop=drop).adjustments == []
    row: dict[str, Any] = {"clamp": {"width": (64, 512, 0)}, "drop": ["output_format"]}
    assert fit_input(ImageInput(prompt="x"), **row).adjustments == []


@pytest.mark.parametrize(("penalty", "reported"), [(0, ""), (0.5, "presence_penalty; frequency_penalty")])
def test_a_penalty_of_0_that_is_dropped_is_not_an_adjustment(penalty: float, reported: str) -> None:
    original = TextInput(messages=MESSAGES, presence_penalty=penalty, frequency_penalty=penalty)
    made = fit_input(original, drop=["presence_penalty", "frequency_penalty"])
    assert made.input == TextInput(messages=MESSAGES)
    assert adjusted_header(made.adjustments) == reported


def test_a_zero_that_is_dropped_is_an_adjustment_if_it_has_an_effect() -> None:
    made = fit_input(TextInput(messages=MESSAGES, temperature=0, seed=0), drop=["temperature", "seed"])
    assert adjusted_header(made.adjustments) == "temperature; seed"


def test_a_number_that_the_operator_fixes_has_the_type_of_its_field() -> None:
    fixed = {"seed": 50.0, "temperature": 1}
    names = {name: name for name in fixed}
    made = fit_input(TextInput(seed=70, temperature=0.5), lambda fitting: fitting.override(names, fixed))
    assert adjusted_header(made.adjustments) == "temperature=1; seed=50"
    assert made.input == TextInput(seed=50, temperature=1)


def test_max_tokens_are_not_fixed_by_the_operator() -> None:
    original = TextInput(max_tokens=70)
    made = fit_input(original, lambda fitting: fitting.override({"max_tokens": "limit"}, {"limit": 50}))
    assert (made.input, made.adjustments) == (original, [])


def test_the_message_of_a_refused_cap_has_the_models_maximum() -> None:
    error = fit_input(TextInput(messages=MESSAGES, max_tokens=900), limit=100).refusal()
    assert error.message == "Invalid max_tokens: must be a whole number from 1 to 100"


def test_a_field_that_is_not_a_parameter_is_never_dropped() -> None:
    original = ImageInput(prompt="x")
    assert fit_input(original, drop=["prompt", "response_format", "audio", "unheard_of"]).input is original


def test_a_clamp_of_a_field_that_is_not_a_number_is_ignored() -> None:
    original = ImageInput(prompt="x", output_format=ImageFormat.IMAGE_FORMAT_WEBP)
    assert fit_input(original, clamp={"output_format": (1, 1, 0)}).input is original


def test_a_fit_hook_runs_after_the_row_and_its_changes_are_reported() -> None:
    def hook(fitting: Fitting) -> None:
        assert fitting.get("temperature") == 1
        assert fitting.get("seed") is None
        fitting.drop("temperature", "left out")
        fitting.replace("top_p", 0.5, "0.5")

    original = TextInput(messages=MESSAGES, temperature=2, seed=1)
    made = fit_input(original, hook, drop=["seed"], clamp={"temperature": (0, 1, 0)})
    assert adjusted_header(made.adjustments) == "temperature; seed"
    assert made.input == TextInput(messages=MESSAGES, top_p=0.5)


def test_items_of_a_list_are_reported_by_their_index() -> None:
    def hook(fitting: Fitting) -> None:
        fitting.drop_items("stop", lambda item: item == "b", "other strings")

    made = fit_input(TextInput(stop=["a", "b", "c", "b"]), hook)
    assert (adjusted_header(made.adjustments), list(made.input.stop)) == ("stop[1]; stop[3]", ["a", "c"])
    assert made.refusal().message == "Invalid stop[1]: must be other strings"
    made = fit_input(TextInput(stop=["b", "b"]), hook)
    assert (adjusted_header(made.adjustments), list(made.input.stop)) == ("stop", [])


def test_a_value_that_is_unchanged_in_the_end_is_not_an_adjustment() -> None:
    fixed = {"temperature": 2, "user": "ours"}
    names = {"temperature": "temperature", "user": "user", "top_p": "top_p"}
    made = fit_input(
        TextInput(temperature=2, top_p=0.5),
        lambda fitting: fitting.override(names, fixed),
        user="me",
        clamp={"temperature": (0, 1, 0)},
    )
    assert (adjusted_header(made.adjustments), made.get("temperature")) == ("user", 2)


@pytest.mark.parametrize(
    ("clamp", "takes"),
    [
        ((256, 1440, 32), "Invalid width: must be a multiple of 32 from 256 to 1,440"),
        ((256, 1_000_000, 1000), "Invalid width: must be a multiple of 1,000 from 256 to 1,000,000"),
        ((256.0, 512.0, 0), "Invalid width: must be a number from 256 to 512"),
    ],
)
def test_the_message_of_a_refusal_has_the_limit_of_the_model(
    clamp: tuple[float, float, float], takes: str
) -> None:
    made = fit_input(ImageInput(prompt="x", width=2001), clamp={"width": clamp})
    error = made.refusal()
    assert (error.code, error.field, error.message) == ("invalid_parameter", "width", takes)


def test_a_model_without_tools_gets_none_and_no_choice_between_them() -> None:
    original = TextInput(
        messages=MESSAGES,
        tools=[Tool(name="weather")],
        tool_choice=ToolChoice(mode=ToolChoice.MODE_REQUIRED),
        parallel_tool_calls=False,
    )
    made = fit_input(original, drop=["tools"])
    assert made.input == TextInput(messages=MESSAGES)
    assert adjusted_header(made.adjustments) == "tools; tool_choice; parallel_tool_calls"
    assert fit_input(original).input is original


def test_the_format_of_the_output_has_the_name_that_callers_know() -> None:
    original = TextInput(format=TextFormat(json_object=TextFormat.JsonObject()))
    made = fit_input(original, drop=["format"])
    assert (adjusted_header(made.adjustments), made.input) == ("response_format", TextInput())
    assert made.refusal().field == "response_format"


@pytest.mark.parametrize(
    ("efforts", "given", "used", "reported"),
    [
        ((), REASONING_EFFORT_MAX, REASONING_EFFORT_MAX, ""),
        ((REASONING_EFFORT_LOW,), 0, 0, ""),
        ((REASONING_EFFORT_NONE, REASONING_EFFORT_HIGH), REASONING_EFFORT_HIGH, REASONING_EFFORT_HIGH, ""),
        (
            (REASONING_EFFORT_NONE, REASONING_EFFORT_HIGH),
            REASONING_EFFORT_MAX,
            REASONING_EFFORT_HIGH,
            "reasoning_effort=high",
        ),
        (
            (REASONING_EFFORT_LOW, REASONING_EFFORT_MEDIUM),
            REASONING_EFFORT_NONE,
            REASONING_EFFORT_LOW,
            "reasoning_effort=low",
        ),
        (
            (REASONING_EFFORT_NONE, REASONING_EFFORT_LOW),
            REASONING_EFFORT_MINIMAL,
            REASONING_EFFORT_NONE,
            "reasoning_effort=none",
        ),
    ],
)
def test_a_reasoning_effort_is_the_nearest_one_of_the_route(
    efforts: tuple[ReasoningEffort.ValueType, ...],
    given: ReasoningEffort.ValueType,
    used: ReasoningEffort.ValueType,
    reported: str,
) -> None:
    made = fit_input(TextInput(messages=MESSAGES, reasoning_effort=given), efforts=efforts)
    assert (made.input.reasoning_effort, adjusted_header(made.adjustments)) == (used, reported)


def test_a_job_is_fitted_to_another_route_from_what_the_caller_gave() -> None:
    original = TextInput(messages=MESSAGES, temperature=2, seed=1)
    first = Route("p", "m", drop=frozenset(("seed", "user")), clamp={"temperature": (0, 1, 0)})
    second = Route("p", "n", clamp={"temperature": (0, 1.5, 0)})
    model = Model("x", TaskType.TASK_TYPE_TEXT, (first, second), Limits(), Prices(), "test")
    given = Given(original, "ann")
    job = fit_job(Job("t", model, first, original, stream=False, deadline=1.0, given=given), None)
    assert (job.input, job.user) == (TextInput(messages=MESSAGES, temperature=1), "")
    job = fit_job(replace(job, route=second), None)
    assert (job.input, job.user) == (TextInput(messages=MESSAGES, temperature=1.5, seed=1), "ann")
    assert adjusted_header(job.adjustments) == "temperature=1.5"


def test_the_message_of_a_refused_effort_lists_those_of_the_route() -> None:
    given = TextInput(reasoning_effort=REASONING_EFFORT_MAX)
    made = fit_input(given, efforts=(REASONING_EFFORT_NONE, REASONING_EFFORT_HIGH))
    assert made.refusal().message == "Invalid reasoning_effort: must be one of none, high"
    made = fit_input(given, efforts=(REASONING_EFFORT_NONE,))
    assert made.refusal().message == "Invalid reasoning_effort: must be none"
