"""The operator's page at the admin address of a running server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from pomelo.cli.operator_page import OperatorPage
from pomelo.telemetry.admin import open_admin
from pomelo.telemetry.exposition import Exposition, open_worker_socket
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.readiness import Readiness
from tests.browser.access import overflow, serious_faults
from tests.browser.chromium import Browser
from tests.ports import free_port
from tests.serving import Served, serve
from tests.tasks import text_body


@dataclass(frozen=True)
class Operated:
    """A server, the address of its admin server, and a client."""

    served: Served
    admin: str
    http: aiohttp.ClientSession

    async def run(self, text: str) -> int:
        """Runs a text task with the development key; returns the status."""
        url = f"{self.served.url}/api/v1/task"
        async with self.http.post(url, json=text_body(text), headers=self.served.headers) as response:
            await response.read()
            return response.status


@pytest.fixture(scope="module")
async def operated(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Operated]:
    port = free_port()
    folder = tmp_path_factory.mktemp("operated")
    async with (
        serve(folder, POMELO_ADMIN=f"127.0.0.1:{port}") as served,
        aiohttp.ClientSession() as http,
    ):
        yield Operated(served, f"http://127.0.0.1:{port}", http)


def section(name: str) -> str:
    """Returns the expression of the text of a section of the page."""
    return f"(document.querySelector('section[aria-label=\"{name}\"]')?.innerText ?? '')"


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1440, "dark")])
async def test_the_operator_sees_load_errors_spend_accounts_and_keys(
    browser: Browser, operated: Operated, modules: Path, width: int, scheme: str
) -> None:
    assert await operated.run("Hello") == 200
    assert await operated.run("[[error:provider_failed]]") == 502
    async with browser.open_tab() as tab:
        await tab.look(width, scheme)
        await tab.open(f"{operated.admin}/")
        await tab.until(f"{section('Accounts')}.includes('default')")
        await tab.until(f"{section('Errors')}.includes('provider_failed')")
        assert "sandbox" in await tab.run(section("Providers"))
        assert "closed" in await tab.run(section("Providers"))
        assert "gpt-4" in await tab.run(section("Spend since start"))
        assert await tab.run("document.querySelector('#state').textContent") == "Ready"
        await tab.click("[aria-label='Keys of default']")
        await tab.until(f"{section('Keys')}.includes('Those of default')")
        assert operated.served.key.split("_")[2] in await tab.run(section("Keys"))
        assert operated.served.key not in await tab.run("document.documentElement.outerHTML")
        assert await serious_faults(tab, modules) == []
        assert await overflow(tab) == []
        assert tab.problems == []


def cells(name: str) -> str:
    """Returns the expression of the texts in the first row of a section's table."""
    row = f"document.querySelector('section[aria-label=\"{name}\"] tbody tr')"
    return f"[...{row}.cells].map((each) => each.textContent)"


async def test_the_operators_page_follows_what_happens(browser: Browser, operated: Operated) -> None:
    ended = """[...document.querySelectorAll('dt')].find((each) => each.textContent === 'Tasks since start')
      ?.nextSibling.textContent"""
    async with browser.open_tab() as tab:
        await tab.open(f"{operated.admin}/")
        await tab.until(ended)
        before = int(await tab.run(ended))
        assert await operated.run("Hello") == 200
        await tab.until(f"Number({ended}) === {before + 1}")
        # Only the test key was used, and the account has no live credits.
        await tab.until(f"{section('Accounts')}.includes('default')")
        account = await tab.run(cells("Accounts"))
        assert account[0:2] == ["default", "pro"]
        assert account[2:4] == ["0", "0"]
        assert float(account[4]) > 99
        model, live, test, *_ = await tab.run(cells("Spend since start"))
        assert (model, live) == ("gpt-4", "0")
        assert float(test) > 0


@pytest.mark.parametrize("button", ["Refresh", "Keys of all accounts"])
async def test_a_list_that_is_shown_again_keeps_the_focus(
    browser: Browser, operated: Operated, button: str
) -> None:
    async with browser.open_tab() as tab:
        await tab.open(f"{operated.admin}/")
        await tab.until(f"{section('Accounts')}.includes('default')")
        await tab.click("[aria-label='Keys of default']")
        await tab.until(f"{section('Keys')}.includes('Those of default')")
        await tab.run(
            f"""[...document.querySelectorAll('section[aria-label=Keys] button')]
            .find((each) => each.textContent === {button!r}).focus()"""
        )
        await tab.press("Enter")
        await tab.until("document.activeElement === document.querySelector('section[aria-label=Keys] h2')")


async def test_metrics_that_are_missing_are_not_shown_as_ready_and_test_credits_not_as_live_ones(
    browser: Browser, tmp_path: Path
) -> None:
    metrics, faults = Metrics(), [RuntimeError()]
    metrics.ready.read_one(lambda: 1)
    metrics.held.read(lambda: {("live",): 1.5, ("test",): 100.0})

    async def refresh() -> None:
        if faults:
            raise faults[0]

    metrics.before_reading(refresh)
    others = {1: tmp_path / "worker-1.sock"}
    admin = open_admin(
        "127.0.0.1:0", Exposition(metrics, 0, others), Readiness(), find_page=OperatorPage().find
    )
    state = "document.querySelector('#state').textContent"
    async with admin as address, browser.open_tab() as tab:
        await tab.open(f"http://{address}/")
        await tab.until(f"{state} === 'Error 500'")
        faults.clear()
        await tab.until(f"{state} === 'A worker does not answer'")
        others.clear()
        await tab.until(f"{state} === 'Ready'")
        assert "Live credits held\n1.5\n" in await tab.run(section("Load"))


async def test_the_rate_counts_from_0_after_a_worker_was_restarted_and_leaves_out_one_that_did_not_report(
    browser: Browser, tmp_path: Path
) -> None:
    metrics, other = Metrics(), Metrics()
    ended = ("rest", "live", "text", "gpt-4", "openai", "ok")
    metrics.tasks.values[ended], other.tasks.values[ended] = 1_000_000, 7_000_000
    others = {1: tmp_path / "worker-1.sock"}
    admin = open_admin(
        "127.0.0.1:0", Exposition(metrics, 0, others), Readiness(), find_page=OperatorPage().find
    )

    def fact(name: str) -> str:
        found = f"[...document.querySelectorAll('dt')].find((each) => each.textContent === '{name}')"
        return f"{found}?.nextSibling.textContent.replaceAll(/[^0-9.-]/g, '')"

    async with admin as address, browser.open_tab() as tab:
        await tab.open(f"http://{address}/")
        await tab.until(f"{fact('Tasks since start')} === '1000000'")
        metrics.tasks.values[ended] = 50  # it was restarted, and has run 50 tasks since
        async with open_worker_socket(Exposition(other, 1), others[1]):
            await tab.until(f"{fact('Tasks since start')} === '7000050'")
        assert 0 < float(await tab.run(fact("Tasks per second"))) <= 50


async def test_a_server_that_drains_is_shown_as_draining_not_as_one_with_a_broken_worker(
    browser: Browser, tmp_path: Path
) -> None:
    metrics = Metrics()
    metrics.draining.read_one(lambda: 1)
    exposition = Exposition(metrics, 0, {1: tmp_path / "worker-1.sock"})
    admin = open_admin("127.0.0.1:0", exposition, Readiness(), find_page=OperatorPage().find)
    async with admin as address, browser.open_tab() as tab:
        await tab.open(f"http://{address}/")
        await tab.until("document.querySelector('#state').textContent === 'Draining'")


@pytest.mark.parametrize("path", ["accounts", "keys"])
async def test_pages_of_other_sites_can_not_read_the_lists_through_a_name_of_their_own(
    operated: Operated, path: str
) -> None:
    url = f"{operated.admin}/{path}"
    for host, status in {
        "127.0.0.1:9090": 200,
        "localhost": 200,
        "[::1]:9090": 200,
        "10.0.0.5:9090": 403,
        "evil.example:9090": 403,
        "127.0.0.1.evil.example": 403,
        "localhost.evil.example": 403,
    }.items():
        async with operated.http.get(url, headers={"Host": host}) as response:
            assert response.status == status, host
            assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("path", ["accounts", "keys"])
@pytest.mark.parametrize("header", ["Forwarded", "Via", "X-Forwarded-For", "X-Real-IP"])
async def test_a_proxy_on_the_same_machine_does_not_show_the_lists(
    operated: Operated, path: str, header: str
) -> None:
    async with operated.http.get(f"{operated.admin}/{path}", headers={header: "10.0.0.5"}) as response:
        assert response.status == 403
        assert "default" not in await response.text()


async def test_the_lists_are_not_changed_through_the_operators_page(operated: Operated) -> None:
    for method in ("POST", "PUT", "DELETE"):
        async with operated.http.request(method, f"{operated.admin}/keys") as response:
            assert response.status == 405


@pytest.mark.parametrize("path", ["accounts", "keys"])
async def test_an_invalid_page_token_of_the_lists_is_refused(operated: Operated, path: str) -> None:
    async with operated.http.get(f"{operated.admin}/{path}?page_token=x") as response:
        assert response.status == 400
        assert "page_token" in await response.text()


async def test_the_operators_files_are_not_served_to_callers(operated: Operated) -> None:
    for name, path in {"admin": operated.admin, "rest": operated.served.url}.items():
        async with operated.http.get(f"{path}/page/operator.js") as response:
            assert response.status == (200 if name == "admin" else 404)


def test_a_gateway_has_no_accounts() -> None:
    page = OperatorPage()
    assert page.find("/accounts") is None
    assert page.find("/keys") is None
    assert page.find("/nothing") is None
    assert page.find("/") is not None
