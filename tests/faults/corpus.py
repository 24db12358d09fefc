"""Malformed requests: hand-written ones, and seeded mutations of good ones."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

GOOD: list[dict[str, Any]] = [
    {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "temperature": 0.5,
     "top_p": 1, "stop": ["x"], "seed": 1, "presence_penalty": 0, "frequency_penalty": 0, "user": "u", "stream": False},
    {"model": "gpt-4", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    {"model": "flux-1-pro", "prompt": "A kite", "width": 64, "height": 64, "num_inference_steps": 2,
     "guidance_scale": 3, "seed": 4, "output_format": "png", "response_format": "url"},
    {"model": "eleven-labs-tts", "text": "Hi", "voice": "adam", "voice_settings": {"stability": 0.5, "speed": 1},
     "output_format": "pcm_8000", "language_code": "en"},
    {"model": "eleven-labs-sts", "audio": "UklGRgAAAABXQVZF", "voice": "adam", "output_format": "ulaw_8000"},
    {"model": "eleven-labs-stt", "audio": "UklGRgAAAABXQVZF", "diarize": True, "num_speakers": 2, "timestamps": "word"},
]  # fmt: skip

ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, 2**31, 2**63, -(2**63) - 1, 2**70, 1e308, -0.0, "", " ", "x", "0", "NaN", "true",
    "\x00", "\u202e", "😀" * 50, "a" * 5000, [], [[]], [None], {}, {"a": {}}, [{}], [1, "x", None], {"": ""},
    "data:audio/mpeg;base64,!!", "media_x", "../../etc/passwd", "%s%n", "${jndi:x}", "' OR 1=1 --",
]  # fmt: skip

HEAD = "POST /api/v1/task HTTP/1.1\r\nHost: pomelo\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"


def _post(key: str, body: bytes, content_type: str = "application/json", headers: str = "") -> bytes:
    head = (
        HEAD.format(key=key) + f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode("utf-8", "surrogateescape") + body


def _nested(depth: int, left: str, right: str) -> bytes:
    return (left * depth + "1" + right * depth).encode()


def handwritten(key: str) -> Iterator[bytes]:
    """Malformed heads, framings, content types, bodies and headers."""
    good = json.dumps(GOOD[0]).encode()
    head = HEAD.format(key=key)
    length = f"Content-Length: {len(good)}\r\n"
    content_type_header = "Content-Type: application/json\r\n"
    requests = [
        b"", b"\r\n\r\n", b"\x00" * 64, b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET  /  HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", b"G\x00T / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://other/api/v1/models HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /%zz%00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 9000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n folded\r\n\r\n", b"GET / HTTP/1.1\nHost: x\n\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA\x00B: c\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n: c\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"TRACE /api/v1/task HTTP/1.1\r\nHost: x\r\n\r\n", b"BREW /api/v1/task HTTP/1.1\r\nHost: x\r\n\r\n",
    ]  # fmt: skip
    yield from requests
    for framing in (
        "Content-Length: -1\r\n", "Content-Length: 1e3\r\n", "Content-Length: 99999999999999999999\r\n",
        "Content-Length: 1\r\nContent-Length: 2\r\n", length + "Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding: gzip, chunked\r\n", "Transfer-Encoding: xchunked\r\n", length + "Content-Encoding: gzip\r\n",
        length + "Content-Encoding: br\r\n", length + "Expect: 200-ok\r\n", length + "Upgrade: h2c\r\nConnection: Upgrade\r\n",
    ):  # fmt: skip
        yield (head + content_type_header + framing + "\r\n").encode() + good
    for chunks in (
        b"zz\r\n", b"-1\r\n", b"5;x=\x00\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffff\r\n", b"5\r\nhel", b"5\r\nhelloX\r\n",
    ):  # fmt: skip
        yield (head + content_type_header + "Transfer-Encoding: chunked\r\n\r\n").encode() + chunks
    for content_type in ("", "text/plain", "application/xml", "application/json; charset=utf-16", "multipart/form-data",
                         "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 300, "json", "a/b/c",
                         "application/x-www-form-urlencoded", "application/json;;;", "multipart/mixed; boundary=x"):  # fmt: skip
        yield _post(key, good, content_type)
    for body in (
        b"", b" ", b"null", b"1", b'"x"', b"[]", b"{", b"}", b"{}x", b"{'a':1}", b'{"a":NaN}', b'{"a":Infinity}', b"\xff\xfe{}",
        b"\xef\xbb\xbf{}", b'{"model":"\xff"}', b'{"model":"\\ud800"}', b'{"model":"\\u0000"}', b'{"a":' + b"9" * 5000 + b"}",
        b'{"model":"gpt-4","messages":[{"role":"user","content":"\\ud800"}]}', _nested(200, "[", "]"), _nested(200, '{"a":', "}"),
        b'{"model":"gpt-4","messages":' + _nested(200, "[", "]") + b"}", _nested(100_000, "[", "]"), b"[" * 100_000,
        b'{"model":"gpt-4","messages":[{"role":"user","content":"Hi","deep":' + _nested(150, '{"a":', "}") + b"}]}",
        json.dumps({f"k{i}": i for i in range(50_000)}).encode(), b'{"model":"gpt-4","model":"flux-1-pro"}', b'{"a":1e999}',
    ):  # fmt: skip
        yield _post(key, body)
    for timeout in ("0", "-1", "nan", "inf", "1e400", "soon", "1,5", ""):
        yield _post(key, good, headers=f"X-Request-Timeout: {timeout}\r\n")
    for request_id in ("a" * 5000, "a b", "\udcff", "é", "", "{{7*7}}"):
        yield _post(key, good, headers=f"X-Request-Id: {request_id}\r\n")
    for authorization in (
        "", "Basic x", "Bearer", "Bearer  ", "Bearer a b", "Bearer " + "k" * 5000, "bearer pml_live_x", "\udcff",
    ):  # fmt: skip
        yield _post("x", good).replace(b"Bearer x", authorization.encode("utf-8", "surrogateescape"))
    for path in ("/", "/api/v1/task/", "/api/v2/task", "/media/", "/media/x?exp=1&sig=x", "/media/..%2f..%2fsecret",
                 "/media/media_" + "0" * 42 + ".png?exp=99999999999&sig=" + "A" * 43, "/openapi.json?x=" + "y" * 4000,
                 "/api/v1/models/%00", "/api/v1/models/" + "m" * 3000, "/api/v1/models?x[]=1", "//api/v1/task"):  # fmt: skip
        for method in ("GET", "PUT", "DELETE", "PATCH", "POST", "HEAD", "OPTIONS"):
            yield f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()


def multiparts(key: str) -> Iterator[bytes]:
    ok = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\neleven-labs-stt\r\n'
    file = b'--B\r\nContent-Disposition: form-data; name="audio"; filename="a.mp3"\r\n\r\nabc\r\n'
    for body in (
        b"", b"--B--\r\n", b"--B\r\n", ok, ok + file, ok + b"--B--", ok + ok + b"--B--\r\n", b"junk" + ok + b"--B--\r\n",
        b"--B\r\n\r\nx\r\n--B--\r\n", b'--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--\r\n',
        b'--B\r\nContent-Disposition: form-data; name=""\r\n\r\nx\r\n--B--\r\n',
        b'--B\r\nContent-Disposition: attachment; name="model"\r\n\r\nx\r\n--B--\r\n',
        b"--B\r\n" + b"A: b\r\n" * 500 + b"\r\nx\r\n--B--\r\n", b"--B\r\nA" + b"a" * 20_000 + b": b\r\n\r\nx\r\n--B--\r\n",
        b'--B\r\nContent-Disposition: form-data; name="model"\r\nContent-Transfer-Encoding: base64\r\n\r\n!!\r\n--B--\r\n',
        b'--B\r\nContent-Disposition: form-data; name="model"\r\nContent-Type: multipart/mixed; boundary=C\r\n\r\n--C\r\n\r\nx\r\n--C--\r\n--B--\r\n',
        b'--B\r\nContent-Disposition: form-data; name="model"\r\nContent-Encoding: gzip\r\n\r\nx\r\n--B--\r\n',
        ok.replace(b"eleven-labs-stt", b"\xff\xfe\x00") + b"--B--\r\n", ok + file.replace(b"a.mp3", b"../../x\x00.mp3") + b"--B--\r\n",
        b"".join(ok.replace(b'"model"', b'"m%d"' % i) for i in range(2000)) + b"--B--\r\n",
        ok.replace(b"model", b"messages").replace(b"eleven-labs-stt", b"[[[[") + b"--B--\r\n",
        ok + ok.replace(b'"model"', b'"diarize"').replace(b"eleven-labs-stt", b"maybe") + b"--B--\r\n",
        ok + ok.replace(b'"model"', b'"num_speakers"').replace(b"eleven-labs-stt", b"1e9") + b"--B--\r\n",
    ):  # fmt: skip
        yield _post(key, body, "multipart/form-data; boundary=B")
        yield _post(key, body, 'multipart/form-data; boundary="B"')


def odd_values(key: str) -> Iterator[bytes]:
    """Every field of every good request with every odd value, and an unknown field."""
    for good in GOOD:
        for field in good:
            for odd in ODD:
                yield _post(key, json.dumps(good | {field: odd}).encode())
        yield _post(key, json.dumps(good | {"unknown": 1}).encode())
    for odd in ODD:
        for message in ({"role": odd, "content": "Hi"}, {"role": "user", "content": odd}, {"role": "user", "content": [odd]},
                        {"role": "user", "content": [{"type": odd}]}, {"role": "user", "content": [{"type": "text", "text": odd}]},
                        {"role": "user", "content": [{"type": "image_url", "image_url": odd}]}, odd):  # fmt: skip
            yield _post(key, json.dumps({"model": "gpt-4", "messages": [message]}).encode())
        speech = {"model": "eleven-labs-tts", "text": "x", "voice": "adam", "voice_settings": {"speed": odd}}
        yield _post(key, json.dumps(speech).encode())


def mutated(key: str, count: int, seed: int = 7) -> Iterator[bytes]:
    """Good requests with bytes of the body, or of the whole request, removed, inserted, flipped or
    repeated."""
    rng = random.Random(seed)
    for _ in range(count):
        body = bytearray(json.dumps(rng.choice(GOOD)).encode())
        whole = rng.random() < 0.3
        data = bytearray(_post(key, bytes(body))) if whole else body
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data)) if data else 0
            match rng.randrange(5):
                case 0:
                    del data[at : at + rng.randint(1, 20)]
                case 1:
                    data[at:at] = rng.randbytes(rng.randint(1, 8))
                case 2 if data:
                    data[at] ^= 1 << rng.randrange(8)
                case 3:
                    data[at:at] = data[at : at + rng.randint(1, 40)]
                case _:
                    data = data[: max(1, at)]
        yield bytes(data) if whole else _post(key, bytes(data))


def all_requests(key: str) -> list[bytes]:
    """At least 5,000 requests, the same in each run."""
    requests = [*handwritten(key), *multiparts(key), *odd_values(key)]
    return requests + list(mutated(key, max(0, 5000 - len(requests))))
