"""What a gateway is set to and what its handlers share.

`gateway.app` makes it; every route is called with it.
"""

from dataclasses import dataclass, field

from gateway.render import Link
from pomelo.service import Services

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """What can be set; sizes in bytes, times in seconds.

    `public_url` is where callers reach this gateway; media links lead there (empty: where it listens).
    `json_limit` bounds a JSON body and a form without its file, `upload_limit` a file; audio given as
    base64 is passed inline up to `inline_limit` and stored beyond it. `keep_alive` is the silence after
    which a stream sends a comment. `head_timeout` bounds a request's head, `read_timeout` the time between
    two pieces of its body, `write_timeout` the time in which a client must take something of an answer,
    `idle_timeout` the time between two requests. `max_connections` is of all clients together.
    `linger_timeout` is how long the rest of a refused body is thrown away, so that its sender reads the
    refusal; `drain_timeout` is what running requests get when the gateway closes.
    """

    public_url: str = ""
    json_limit: int = 8 * MIB
    upload_limit: int = 50 * MIB
    inline_limit: int = MIB
    keep_alive: float = 15.0
    head_timeout: float = 10.0
    read_timeout: float = 30.0
    write_timeout: float = 30.0
    idle_timeout: float = 75.0
    max_connections: int = 1024
    linger_timeout: float = 10.0
    drain_timeout: float = 2.0


@dataclass(slots=True)
class Gateway:
    """What the handlers share.

    `link` puts media links where callers reach this gateway; `kinds` remembers which kind of task a model
    serves.
    """

    services: Services
    options: GatewayOptions
    link: Link
    description: bytes
    kinds: dict[str, int] = field(default_factory=dict)
