"""Encodes `data:` URIs, and decodes them and base64 in all spellings of browsers and libraries.

Accepted: white space and line breaks anywhere, missing padding, the URL-safe alphabet, percent-encoding,
capitals, and parameters in any order. Everything else that is not base64 is refused. Decoding takes linear
time and works in small steps.
"""

from __future__ import annotations

import re
from binascii import a2b_base64, a2b_qp, b2a_base64
from collections.abc import Iterator, Mapping

from pydantic_core import SchemaValidator, core_schema

from pomelo.errors import PomeloError

MAX_HEAD = 1024
"""Maximum characters of a `data:` URI before its base64."""

_STEP = 64 * 1024
"""Characters that are decoded in one step."""

_SCHEME = re.compile(r"\s*data:", re.IGNORECASE)
_QUOTED = r'"(?:[^"\\]|\\.)*+"'
# Parameter values may have commas (codecs=vp8,opus): the base64 begins at the first comma after `;base64`,
# which is last, or followed by parameters without commas.
_HEAD = re.compile(
    rf'\s*data:([^;,"]*)((?:;(?!\s*base64\s*[;,])(?:[^;"]|{_QUOTED})*+)*+);\s*base64\s*'
    rf'((?:;(?:[^;,"]|{_QUOTED})*+)*+),',
    re.IGNORECASE | re.DOTALL,
)

# Some browsers write this for a file whose media type they do not know.
_HEAD_WITHOUT_TYPE = re.compile(r"\s*data:\s*base64\s*,", re.IGNORECASE)

_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_SPACE = b" \t\r\n\f\v"
_STANDARD = bytes.maketrans(b"-_", b"+/")
_NO_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_TO_QUOTED_PRINTABLE = bytes.maketrans(b"%", b"=")
_LAST_QUAD = re.compile(r"[A-Za-z0-9+/]{2}(?:[A-Za-z0-9+/]{2}|[A-Za-z0-9+/]=|==)")
_DECODER = SchemaValidator(core_schema.bytes_schema(), {"val_json_bytes": "base64"})


def head(text: str, field: str) -> tuple[str, int]:
    """The unparsed media type of a `data:` URI (empty if absent), and the position of its base64; "" and 0
    for any other text. `field` is the field's name in error messages.

    Raises:
        PomeloError: invalid_parameter: the `data:` URI is not base64.
    """
    start = text[:MAX_HEAD]
    if _SCHEME.match(start) is None:
        return "", 0
    match = _HEAD.match(start)
    if match is None:
        if untyped := _HEAD_WITHOUT_TYPE.match(start):
            return "", untyped.end()
        problem = f"no ';base64,' in the first {MAX_HEAD:,} characters of the data: URI"
        raise _refusal(field, problem, {"maxCharacters": MAX_HEAD})
    return (match[1] + match[2] + match[3]).strip(), match.end()


def decode(text: str, start: int, field: str) -> Iterator[bytes]:
    """Decodes the base64 that begins at `start`, in chunks of 1 byte to 48 KiB.

    Raises:
        PomeloError: invalid_parameter, naming `field`: it is not base64.
    """
    return map(_decode, _quads(text, start, field))


def _decode(quads: bytes) -> bytes:
    # The other decoder is four times as fast, but refuses padding after bits that are not zero.
    return a2b_base64(quads) if quads.endswith(b"=") else _DECODER.validate_json(b'"%b"' % quads)


def canonical(text: str, start: int, media_type: str, field: str) -> str:
    """The `data:` URI in the form that every vendor takes: `media_type`, no parameters, padded standard
    base64.

    Returns `text` itself if it has that form.

    Raises:
        PomeloError: invalid_parameter, naming `field`: it is not base64.
    """
    prefix = f"data:{media_type};base64,"
    if text.startswith(prefix) and _is_canonical(text, start):
        return text
    uri = bytearray(prefix, "ascii")
    for quads in _quads(text, start, field):
        uri += quads
    return uri.decode("ascii")


def _is_canonical(text: str, start: int) -> bool:
    """Whether what begins at `start` is padded standard base64."""
    end = len(text) - 4  # only the last four characters may be padded
    if start > end or (end - start) % 4 or not (text.isascii() and _LAST_QUAD.fullmatch(text, end)):
        return False
    for at in range(start, end, _STEP):
        if text[at : min(at + _STEP, end)].encode().translate(None, _ALPHABET):
            return False
    return True


def encode(data: bytes, media_type: str) -> str:
    """The `data:` URI of these bytes, in the form of `canonical`."""
    return f"data:{media_type};base64,{b2a_base64(data, newline=False).decode()}"


def _quads(text: str, start: int, field: str) -> Iterator[bytes]:
    """Validated base64 of the standard alphabet without white space, in chunks; the last one is padded."""
    escape = rest = b""
    ended = False
    for at in range(start, len(text), _STEP):
        data = _ascii(text[at : at + _STEP], field)
        if not (rest or escape or ended or len(data) % 4 or data.translate(None, _ALPHABET)):
            yield data  # as most libraries write it
            continue
        data = escape + data.translate(None, _SPACE)
        last = at + _STEP >= len(text)
        # A percent-escape may continue in the next step.
        cut = -1 if last else data.rfind(b"%", -2)
        data, escape = (data[:cut], data[cut:]) if cut >= 0 else (data, b"")
        if b"%" in data:
            data = _unescape(data, field)
        data = data.translate(_STANDARD, _SPACE)
        data, padding, trailing = data.partition(b"=")
        if (ended and data) or trailing.strip(b"="):
            raise _refusal(field, "it is not base64: there is text after its padding (=)")
        ended = ended or bool(padding)
        if invalid := data.translate(None, _ALPHABET):
            raise _invalid_character(field, chr(invalid[0]))
        data = rest + data
        excess = len(data) % 4
        if not last:
            whole = len(data) - excess
            data, rest = data[:whole], data[whole:]
        elif excess == 1:
            raise _refusal(field, "it is not whole base64: characters are missing, or there is one too many")
        elif excess:
            data = data.ljust(len(data) + 4 - excess, b"=")
        if data:
            yield data


def _ascii(text: str, field: str) -> bytes:
    try:
        return text.encode("ascii")
    except UnicodeEncodeError as error:
        raise _invalid_character(field, text[error.start]) from None


def _unescape(data: bytes, field: str) -> bytes:
    """Decodes percent-encoding. It differs from quoted-printable only in its sign, and binascii decodes that
    in C: a hundred times faster than urllib if every character is escaped."""
    if _NO_ESCAPE.search(data):
        raise _invalid_character(field, "%")
    return a2b_qp(data.replace(b"=", b"%3D").translate(_TO_QUOTED_PRINTABLE))


def _invalid_character(field: str, character: str) -> PomeloError:
    problem = f"it is not base64: it contains the character {character!a}"
    return _refusal(field, problem, {"character": character})


def _refusal(field: str, problem: str, values: Mapping[str, object] | None = None) -> PomeloError:
    return PomeloError("invalid_parameter", f"Invalid {field}: {problem}", field=field, values=values)
