"""What a gateway is set to and what its handlers share.

`gateway.app` makes it; every route is called with it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.incoming import Pace
from gateway.render import Link
from gateway.turns import ParseQueue
from pomelo.inflight import InFlight
from pomelo.service import Services

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """What can be set; sizes in bytes, times in seconds.

    `public_url` is where callers reach this gateway; media links lead there (empty: where it listens).
    `json_limit` bounds a JSON body and a form without its file, `upload_limit` a file; audio given as
    base64 is passed inline up to `inline_limit` and stored beyond it. `keep_alive` is the silence after
    which a stream sends a comment.

    `head_timeout` bounds a request's head, `read_timeout` the time between two pieces of its body, whose
    `read_rate` in bytes a second is the least after `read_grace`; `write_timeout` is the time in which a
    client must take something of an answer, `idle_timeout` the time between two requests. `linger_timeout` is
    how long the rest of a refused body is thrown away, so that its sender reads the refusal; `drain_timeout`
    is what running requests get when the gateway closes.

    `max_connections` is of all clients together (lowered to half of the files that the process may open),
    `max_untrusted` of slow ones of one address that have not carried a good key; without one a connection
    ends after `untrusted_timeout`. See `ConnectionLimits`. `max_links` are downloads by signed links at once,
    half of them from one address.
    """

    public_url: str = ""
    json_limit: int = 8 * MIB
    upload_limit: int = 50 * MIB
    inline_limit: int = MIB
    keep_alive: float = 15.0
    head_timeout: float = 10.0
    read_timeout: float = 30.0
    read_rate: int = 1024
    read_grace: float = 10.0
    write_timeout: float = 30.0
    idle_timeout: float = 75.0
    max_connections: int = 4096
    max_untrusted: int = 64
    untrusted_grace: float = 1.0
    untrusted_timeout: float = 8.0
    max_links: int = 512
    linger_timeout: float = 10.0
    drain_timeout: float = 2.0


@dataclass(slots=True)
class Gateway:
    """What the handlers share.

    `link` puts media links where callers reach this gateway; `kinds` remembers which kind of task a model
    serves; `parsing` is where large bodies wait for their turn, `links` counts the downloads by signed links.
    `healthy` tells whether new requests are welcome.
    """

    services: Services
    options: GatewayOptions
    link: Link
    description: bytes
    pace: Pace
    parsing: ParseQueue
    links: InFlight
    healthy: Callable[[], bool]
    kinds: dict[str, int] = field(default_factory=dict)
