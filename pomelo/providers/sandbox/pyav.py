"""PyAV, an optional dependency: the sandbox encodes JPEG, WebP, MP3 and Opus with it."""

from __future__ import annotations

from types import ModuleType

from pomelo import install_command
from pomelo.errors import PomeloError


def load_av(file_format: str, alternative: str) -> ModuleType:
    """Imports PyAV to encode `file_format`; takes 0.1 s and 30 MB the first time.

    Raises:
        PomeloError: provider_not_configured, PyAV is not installed. The message names an output_format that
            works without it, the `alternative`.
    """
    try:
        import av
    except ImportError as error:
        raise PomeloError(
            "provider_not_configured",
            f"The sandbox can't encode {file_format} without PyAV. Install it on the server: "
            f"{install_command('sandbox')}; or ask for output_format {alternative}",
        ) from error
    return av
