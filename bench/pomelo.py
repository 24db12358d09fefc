"""`pomelo serve` and `pomelo gateway` in front of the stand-in vendor, and a live key for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from bench.processes import System, module, resident, start
from tests.integration.commands import live_key
from tests.ports import free_port


def settings(vendor: str, folder: Path) -> dict[str, str]:
    """The environment of a server whose vendors are all at one URL."""
    return {
        "POMELO_DATA": str(folder / "data"),
        "POMELO_REST": f"127.0.0.1:{free_port()}",
        "POMELO_GRPC": f"127.0.0.1:{free_port()}",
        "POMELO_ADMIN": "",
        "POMELO_MAX_CALLS": "8192",
        "POMELO_UPSTREAM_CONNECTIONS": "4096",
        "OPENAI_API_KEY": "any",
        "OPENAI_BASE_URL": f"{vendor}/v1",
        "ELEVENLABS_API_KEY": "any",
        "ELEVENLABS_BASE_URL": vendor,
    }


@asynccontextmanager
async def serve(
    folder: Path,
    vendor: str,
    *,
    core: int | None = None,
    gateway: bool = False,
    program: Sequence[str] = ("pomelo.cli", "serve"),
    store: Mapping[str, str] | None = None,
) -> AsyncIterator[System]:
    """Starts a server, and a gateway before it if `gateway` is set. `store` are settings of the store.

    Its account has the plan `unlimited` and more credits than a run can spend.
    """
    variables = settings(vendor, folder) | dict(store or {})
    async with AsyncExitStack() as stack:
        command = module(*program)
        server = await stack.enter_async_context(
            start(command, folder / "output", ready="  data  ", core=core, **variables)
        )
        processes, url = [server], server.url
        key = await live_key(folder, **variables)
        if gateway:
            rest = {
                "POMELO_DATA": str(folder / "gateway"),
                "POMELO_REST": f"127.0.0.1:{free_port()}",
                "POMELO_ADMIN": "",
                "POMELO_SECRET": (folder / "data" / "secret").read_text().strip(),
                "POMELO_MAX_CALLS": variables["POMELO_MAX_CALLS"],
            }
            command = module("pomelo.cli", "gateway", "--target", variables["POMELO_GRPC"], "--no-tls")
            front = await stack.enter_async_context(
                start(command, folder / "gateway-output", ready="  gRPC  ", core=core, **rest)
            )
            processes, url = [server, front], front.url
        ready = max(process.ready_seconds for process in processes)
        idle = resident(processes)
        yield System(processes, url, variables["POMELO_GRPC"], key, ready_seconds=ready, idle_bytes=idle)
