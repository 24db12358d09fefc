"""What `pomelo serve` prints when it serves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pomelo.cli.process import print_greeting
from pomelo.settings import Settings

NO_PROVIDER = "No provider has a key"


@pytest.mark.parametrize("configured", [set[str](), {"openai"}])
@pytest.mark.parametrize("new_key", ["pml_test_new", None])
def test_a_greeting_has_the_addresses_and_what_to_try(
    configured: set[str], new_key: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(data=tmp_path)
    print_greeting(settings, configured, ("127.0.0.1", 8081), "127.0.0.1:50052", "127.0.0.1:9091", new_key)
    printed = capsys.readouterr().out
    for line in (
        "  REST  http://127.0.0.1:8081\n",
        "  gRPC  127.0.0.1:50052\n",
        "  admin http://127.0.0.1:9091/metrics\n",
        f"  data  {tmp_path}\n",
    ):
        assert line in printed
    assert (NO_PROVIDER in printed) is (not configured)
    assert ("Your test key" in printed) is (new_key is not None)
    assert ("curl http://127.0.0.1:8081/api/v1/task" in printed) is (new_key is not None)


def test_an_old_key_is_not_printed_and_servers_that_are_off_have_no_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(data=tmp_path / "my data")
    settings.data.mkdir()
    settings.key_file.write_text("pml_test_old")
    print_greeting(settings, {"openai"}, ("127.0.0.1", 8081), None, "", None)
    printed = capsys.readouterr().out
    (command,) = [line for line in printed.splitlines() if line.startswith("  curl ")]
    script = f"curl() {{ printf '%s\\n' \"$@\"; }}; {command}"
    arguments = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout
    assert "Authorization: Bearer pml_test_old\n" in arguments
    assert "pml_test_old" not in printed
    assert "  gRPC  off\n  admin off\n" in printed
    print_greeting(settings, {"openai"}, None, "127.0.0.1:50052", "", None)
    printed = capsys.readouterr().out
    assert "  REST  off\n" in printed
    assert "curl" not in printed
