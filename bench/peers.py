"""Other gateways, where they are installed: LiteLLM and Portkey, each with the least that it needs to serve.

LiteLLM is the command `litellm`, or the one that LITELLM names. Portkey's gateway is the npm package
`@portkey-ai/gateway`, installed globally or in the folder that PORTKEY names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

LITELLM = "LiteLLM"
PORTKEY = "Portkey"
NAMES = (LITELLM, PORTKEY)
KEY = "sk-bench"

_PACKAGE = Path("@portkey-ai", "gateway", "build", "start-server.js")
_CONFIGURATION = """\
model_list:
  - model_name: gpt-4
    litellm_params: {{model: openai/gpt-4, api_base: "{vendor}/v1", api_key: any}}
general_settings: {{master_key: {key}}}
"""


def find() -> dict[str, list[str]]:
    """The commands of the gateways that are installed, without options."""
    found = {}
    if litellm := shutil.which(os.environ.get("LITELLM", "litellm")):
        found[LITELLM] = [litellm]
    node = shutil.which("node")
    if node is not None and (script := _portkey()) is not None:
        found[PORTKEY] = [node, str(script)]
    return found


def _portkey() -> Path | None:
    folder = os.environ.get("PORTKEY", "")
    if not folder and (npm := shutil.which("npm")):
        listed = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, check=False)  # noqa: S603
        folder = listed.stdout.strip()
    script = Path(folder) / _PACKAGE
    return script if script.is_file() else None


def command(name: str, program: Sequence[str], vendor: str, port: int, folder: Path) -> list[str]:
    """The command that serves on a port of loopback, in front of a vendor."""
    if name == PORTKEY:
        return [*program, f"--port={port}", "--headless"]
    configuration = folder / "litellm.yaml"
    configuration.write_text(_CONFIGURATION.format(vendor=vendor, key=KEY))
    options = ("--host", "127.0.0.1", "--port", str(port), "--num_workers", "1", "--telemetry", "False")
    return [*program, "--config", str(configuration), *options]


READY: Mapping[str, str] = {LITELLM: "Uvicorn running on", PORTKEY: "Ready for connections"}
"""What each prints when it serves."""

VARIABLES: Mapping[str, str] = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
"""Their environment: nothing is fetched from other machines."""


def headers(name: str, vendor: str) -> dict[str, str]:
    """The headers of a request besides the key."""
    if name == PORTKEY:
        return {"x-portkey-provider": "openai", "x-portkey-custom-host": f"{vendor}/v1"}
    return {}
