"""The captions of transcripts: their times, their lines and their escapes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.openai.captions import MAX_LINE, MAX_LINES, make_cues, to_srt, to_vtt
from gateway.openai.segments import join, sentences
from pomelo.gen.v1.speech_pb2 import Transcription
from pomelo.providers.transcripts import add_word

TIMES = re.compile(r"(\d{2,}):([0-5]\d):([0-5]\d)[.,](\d{3})")


def transcript(text: str, *words: tuple[str, float, float], seconds: float = 0.0) -> Transcription:
    """Returns a transcript with words at these times in seconds."""
    made = Transcription(text=text, audio_seconds=seconds)
    for word, start, end in words:
        add_word(made, word, start, end)
    return made


def spoken(text: str, each: float = 0.5) -> Transcription:
    """Returns a transcript whose words take `each` seconds."""
    words = text.split()
    times = [(word, i * each, (i + 1) * each) for i, word in enumerate(words)]
    return transcript(text, *times, seconds=len(words) * each)


def test_srt_numbers_its_cues_and_writes_times_with_a_comma() -> None:
    assert to_srt(spoken("Hi there. How are you?")) == (
        "1\n00:00:00,000 --> 00:00:01,000\nHi there.\n\n2\n00:00:01,000 --> 00:00:02,500\nHow are you?\n\n"
    )


def test_vtt_has_a_header_and_writes_times_with_a_point() -> None:
    assert to_vtt(spoken("Hi there.")) == "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nHi there.\n\n"


def test_silence_has_no_cues() -> None:
    assert (to_srt(transcript("")), to_vtt(transcript("", seconds=3))) == ("", "WEBVTT\n\n")


def test_a_long_sentence_fills_two_lines_and_then_the_next_cue() -> None:
    first, second, *more = make_cues(spoken(" ".join(["wordwordw"] * 12)))
    assert first.lines == second.lines[:0] + (" ".join(["wordwordw"] * 4),) * 2
    assert second.lines == (" ".join(["wordwordw"] * 4),)
    assert (first.start, first.end, second.start, second.end) == (0, 4_000, 4_000, 6_000)
    assert not more


def test_hours_have_as_many_digits_as_they_need() -> None:
    late = transcript("Still here.", ("Still", 360_000.5, 360_001), ("here.", 360_001, 360_002.25))
    assert "100:00:00,500 --> 100:00:02,250" in to_srt(late)


def test_vtt_escapes_what_would_be_markup_or_an_arrow() -> None:
    assert "a &lt;b&gt; &amp; c --&gt; d\n" in to_vtt(spoken("a <b> & c --> d"))


def test_srt_has_no_arrow_in_its_text() -> None:
    (cue,) = to_srt(spoken("a ----> 00:00:00,000 --> b")).strip().split("\n\n")
    assert cue.splitlines()[2] == "a -> 00:00:00,000 -> b"


def test_line_breaks_in_the_text_end_no_cue() -> None:
    (cue,) = to_srt(spoken("one\n\n2\u2028three\x85four")).strip().split("\n\n")
    assert cue.splitlines()[2:] == ["one 2 three four"]


def test_text_without_spaces_is_cut_into_lines() -> None:
    made = transcript("好" * 100, *[("好", i / 10, i / 10 + 0.1) for i in range(100)])
    lines = [line for cue in make_cues(made) for line in cue.lines]
    assert "".join(lines) == "好" * 100
    assert max(map(len, lines)) == MAX_LINE


def test_a_sentence_ends_at_a_pause_and_at_a_change_of_speaker() -> None:
    made = transcript("one two three four", ("one", 0, 1), ("two", 1, 2), ("three", 5, 6))
    add_word(made, "four", 6, 7, "speaker_1")
    assert [join(sentence) for sentence in sentences(made)] == ["one two", "three", "four"]


def test_a_sentence_without_an_end_is_divided_after_half_a_minute() -> None:
    parts = list(sentences(spoken("word " * 90, each=1)))
    assert [len(part) for part in parts] == [30, 30, 30]


def test_a_text_without_words_is_spread_over_the_audio() -> None:
    assert to_srt(transcript("Hi there. Bye now.", seconds=18)) == (
        "1\n00:00:00,000 --> 00:00:09,000\nHi there.\n\n2\n00:00:10,000 --> 00:00:18,000\nBye now.\n\n"
    )


def test_words_that_the_text_lacks_change_only_the_times() -> None:
    made = transcript("Ten o'clock.", ("Ten", 0, 1), ("of", 1, 2), ("clock.", 2, 3))
    assert [cue.lines for cue in make_cues(made)] == [("Ten o'clock.",)]


@pytest.mark.parametrize("ends", [(2.0, 1.0), (9.0, 9.5), (0.0, 0.0)])
def test_words_at_impossible_times_do_not_make_cues_overlap(ends: tuple[float, float]) -> None:
    made = transcript("One. Two. Six.", ("One.", 1, ends[0]), ("Two.", 0.5, ends[1]), ("Six.", 0.2, 0.1))
    assert_in_order(made)
    assert len(list(make_cues(made))) == 3


WORDS = st.lists(st.tuples(st.text(max_size=60), st.floats(-1, 400_000), st.floats(-1, 400_000)), max_size=30)


@given(WORDS, st.floats(0, 400_000), st.booleans())
def test_cues_of_any_transcript_have_all_its_text_in_order(
    words: list[tuple[str, float, float]], seconds: float, with_words: bool
) -> None:
    text = " ".join(word for word, _, _ in words)
    made = transcript(text, *(words if with_words else ()), seconds=seconds)
    assert_in_order(made)
    shown = "".join(line for cue in make_cues(made) for line in cue.lines)
    assert "".join(shown.split()) == "".join(text.split())


def assert_in_order(made: Transcription) -> None:
    """Asserts that the cues have lines of a valid length, and times that increase, in both formats."""
    for cue in make_cues(made):
        assert 0 < len(cue.lines) <= MAX_LINES
        assert all(0 < len(line) <= MAX_LINE and line.splitlines() == [line] for line in cue.lines)
    for captions in (to_srt(made), to_vtt(made)):
        times = [
            ((int(hours) * 60 + int(minutes)) * 60 + int(seconds)) * 1000 + int(ms)
            for line in captions.splitlines()
            if " --> " in line
            for hours, minutes, seconds, ms in TIMES.findall(line)
        ]
        assert times == sorted(times)
        assert all(start < end for start, end in zip(times[::2], times[1::2], strict=True))


def test_a_line_that_is_full_without_its_last_space_is_not_divided() -> None:
    full = " ".join(["wordwordw"] * 4 + ["xx"])
    assert len(full) == MAX_LINE
    (cue,) = make_cues(spoken(f"{full} next"))
    assert cue.lines == (full, "next")


def test_a_word_never_ends_before_it_begins() -> None:
    made = transcript("one two", ("one", 1.0, 0.5), ("two", 2.0, 1.0), seconds=3)
    assert [(piece.start, piece.end) for sentence in sentences(made) for piece in sentence] == [
        (1_000, 1_000),
        (2_000, 2_000),
    ]


def test_a_word_that_ends_after_the_next_one_has_begun_ends_there() -> None:
    spoken_at_once = transcript("Hi. Yo.", ("Hi.", 0, 2), ("Yo.", 1, 3))
    times = [(piece.start, piece.end) for sentence in sentences(spoken_at_once) for piece in sentence]
    assert times == [(0, 1000), (1000, 3000)]
