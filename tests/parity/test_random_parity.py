"""Random tasks have the same outcome over every front end, or the same error of the same field."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest

from tests.conftest import Keys
from tests.driver import TaskRequest
from tests.parity.comparison import Driver, ask_all, assert_same
from tests.parity.random_tasks import PREFERENCES, RandomTasks

TASKS = int(os.environ.get("POMELO_RANDOM_TASKS", "80"))


@pytest.mark.parametrize("seed", range(3))
async def test_random_tasks_have_the_same_outcome(
    seed: int, clients: Mapping[str, Driver], keys: Keys
) -> None:
    tasks = RandomTasks(seed)
    codes: Counter[str] = Counter()
    for _ in range(TASKS):
        headers = {"Prefer": tasks.pick(PREFERENCES)} if tasks.chance(0.15) else {}
        body = tasks.body()
        request = TaskRequest(body, keys.test, tasks.chance(0.4), headers=headers)
        outcomes = await ask_all(clients, request)
        # A byte-order mark is text in a JSON string, but skipped at the beginning of a form's field.
        if "\ufeff" not in json.dumps(body, ensure_ascii=False):
            outcomes["form"] = await clients["rest"](replace(request, form=True))
        assert_same(outcomes, request)
        for name in ("x-pomelo-adjusted", *(() if request.stream else ("x-credits-charged",))):
            values = {outcome.headers.get(name) for outcome in outcomes.values()}
            assert len(values) == 1, f"{name}: {values} of {request}"
        codes[outcomes["rest"].code] += 1
    assert {"ok", "invalid_parameter", "missing_parameter"} <= codes.keys()
