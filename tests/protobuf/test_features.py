"""The features that are planned can be added to the released files without breaking code generated from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.protobuf.additions import FEATURES, add_feature
from tests.protobuf.contract import Contract


def lines(contract: Contract) -> dict[str, list[str]]:
    return {name: contract.read(name).splitlines() for name in contract.names()}


@pytest.mark.parametrize(
    "names",
    [*([name] for name in FEATURES), FEATURES, FEATURES[::-1]],
    ids=[*FEATURES, "all", "all in reverse order"],
)
def test_a_later_feature_is_an_addition(names: Sequence[str], tmp_path: Path) -> None:
    contract = Contract(tmp_path)
    contract.release("v0.1.0")
    before = lines(contract)
    for name in names:
        add_feature(contract, name)
    after = lines(contract)
    assert before != after
    for name, present in before.items():
        remaining = iter(after[name])
        assert all(line in remaining for line in present), f"a line of {name} was changed"
    passed, output = contract.make("proto")
    assert passed, output
    assert "buf breaking --against v0.1.0" in output


def test_what_a_feature_adds_cannot_be_removed_again(tmp_path: Path) -> None:
    contract = Contract(tmp_path)
    add_feature(contract, "reasoning")
    contract.release("v0.1.0")
    contract.replace("pomelo/v1/task.proto", "    ReasoningDelta reasoning_delta = 8;\n", "")
    passed, output = contract.make("breaking")
    assert not passed
    assert '"reasoning_delta"' in output
