"""Reads base64 and `data:` URIs as browsers, libraries and people write them, for audio and images alike.

Accepted: white space and line breaks anywhere, missing padding, the URL-safe alphabet, percent-encoding,
capitals and parameters in any order. Refused: everything else that is not base64. Reading takes time linear
in the text and works in small steps.
"""

from __future__ import annotations

import re
from binascii import a2b_base64, a2b_qp
from collections.abc import Iterator

from pomelo.errors import PomeloError

HEAD_MOST = 1024
"""Characters of a `data:` URI up to the comma before its base64."""

_STEP = 64 * 1024
"""Characters that are read in one step."""

_SCHEME = re.compile(r"\s*data:", re.IGNORECASE)
_QUOTED = r'"(?:[^"\\]|\\.)*+"'
# The value of a parameter may have commas (codecs=vp8,opus): the base64 begins at the first comma after
# `;base64`, which stands last, or before parameters without commas.
_HEAD = re.compile(
    rf'\s*data:([^;,"]*)((?:;(?!\s*base64\s*[;,])(?:[^;"]|{_QUOTED})*+)*+);\s*base64\s*'
    rf'((?:;(?:[^;,"]|{_QUOTED})*+)*+),',
    re.IGNORECASE | re.DOTALL,
)

_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_SPACE = b" \t\r\n\f\v"
_STANDARD = bytes.maketrans(b"-_", b"+/")
_NO_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_TO_QUOTED_PRINTABLE = bytes.maketrans(b"%", b"=")
_PADDED = re.compile(r"[A-Za-z0-9+/]++={0,2}+")


def head(text: str, field: str) -> tuple[str, int]:
    """The media type of a `data:` URI, and where its base64 begins; "" and 0 for any other text.

    The media type is as it is written, for `pomelo.media.media_types`, and empty if absent. `field` is the
    name in messages.

    Raises:
        PomeloError: invalid_parameter: the `data:` URI is not base64.
    """
    start = text[:HEAD_MOST]
    if _SCHEME.match(start) is None:
        return "", 0
    match = _HEAD.match(start)
    if match is None:
        raise _refusal(field, f"no ';base64,' in the first {HEAD_MOST:,} characters of the data: URI")
    return (match[1] + match[2] + match[3]).strip(), match.end()


def decode(text: str, start: int, field: str) -> Iterator[bytes]:
    """Decodes the base64 that begins at `start`, in pieces of up to 48 KiB, none of them empty.

    Raises:
        PomeloError: invalid_parameter, naming `field`; it is not base64.
    """
    return map(a2b_base64, _quads(text, start, field))


def canonical(text: str, start: int, media_type: str, field: str) -> str:
    """The `data:` URI as every vendor takes it: `media_type`, no parameters, padded standard base64.

    `text` itself if that is what it is.

    Raises:
        PomeloError: invalid_parameter, naming `field`; it is not base64.
    """
    prefix = f"data:{media_type};base64,"
    if text.startswith(prefix) and (len(text) - start) % 4 == 0 and _PADDED.fullmatch(text, start):
        return text
    made = bytearray(prefix, "ascii")
    for quads in _quads(text, start, field):
        made += quads
    return made.decode("ascii")


def _quads(text: str, start: int, field: str) -> Iterator[bytes]:
    """Checked base64 of the standard alphabet without white space; the last piece is padded."""
    escape = rest = b""
    ended = False
    for at in range(start, len(text), _STEP):
        data = escape + _ascii(text[at : at + _STEP], field).translate(None, _SPACE)
        last = at + _STEP >= len(text)
        # A percent-escape may go on in the next step.
        cut = -1 if last else data.rfind(b"%", -2)
        data, escape = (data[:cut], data[cut:]) if cut >= 0 else (data, b"")
        if b"%" in data:
            data = _unescape(data, field)
        data = data.translate(_STANDARD, _SPACE)
        data, padding, behind = data.partition(b"=")
        if (ended and data) or behind.strip(b"="):
            raise _refusal(field, "it is not base64: it goes on after its padding (=)")
        ended = ended or bool(padding)
        if others := data.translate(None, _ALPHABET):
            raise _stranger(field, chr(others[0]))
        data = rest + data
        over = len(data) % 4
        if not last:
            whole = len(data) - over
            data, rest = data[:whole], data[whole:]
        elif over == 1:
            raise _refusal(field, "it is not whole base64: characters are missing, or one is too many")
        elif over:
            data = data.ljust(len(data) + 4 - over, b"=")
        if data:
            yield data


def _ascii(text: str, field: str) -> bytes:
    try:
        return text.encode("ascii")
    except UnicodeEncodeError as error:
        raise _stranger(field, text[error.start]) from None


def _unescape(data: bytes, field: str) -> bytes:
    """Undoes percent-encoding. It is quoted-printable with another sign, which binascii decodes in C: a
    hundred times faster than urllib where every character is escaped."""
    if _NO_ESCAPE.search(data):
        raise _stranger(field, "%")
    return a2b_qp(data.replace(b"=", b"%3D").translate(_TO_QUOTED_PRINTABLE))


def _stranger(field: str, character: str) -> PomeloError:
    return _refusal(field, f"it is not base64: it has the character {character!a}")


def _refusal(field: str, wrong: str) -> PomeloError:
    return PomeloError("invalid_parameter", f"Invalid {field}: {wrong}", field=field)
