"""Sums by several groupings are equal in every store and archive."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pomelo.stores.accounts import Grant
from pomelo.stores.archive import open_archive
from pomelo.stores.archive.base import Archive
from pomelo.stores.base import Store
from pomelo.stores.ledger import ReserveRequest, Settlement
from pomelo.stores.usage import (
    DIMENSIONS,
    MAX_GROUPINGS,
    Dimension,
    Grouping,
    MetadataKey,
    UsageQuery,
    UsageRecord,
    UsageTotal,
    decode_metadata,
    encode_metadata,
)
from tests.contract.archive_rig import ARCHIVES, new_url
from tests.contract.ledger_rig import STORES, record

ALL = UsageQuery()
DAY = 86_400.0
TEAM = MetadataKey("team")

ODD_KEYS = [
    *("", " ", "team", "TEAM", "model", 'a"b', "a'b", "' OR 1=1 --", "a.b", "$", "$.x", "$.team", "$[0]", "]"),
    *("[0]", "{}", "{0}", "?", "?1", "$1", ":key", "%s", "%(key)s", "\\", "\\u0000", "\\\\u0000", "/", "\n"),
    *("\x01", "\x7f", "\u2028", "é", "e\u0301", "\uffff", "\U0001f600", "\U0001f600\U0001f601", "\U0010ffff"),
]  # fmt: skip


@dataclass(frozen=True)
class Sums:
    """A store or an archive, and a function that adds records to it."""

    source: Store | Archive
    add: Callable[[Sequence[UsageRecord]], Awaitable[None]]

    async def tasks(self, *by: Grouping, query: UsageQuery = ALL) -> list[tuple[tuple[str, ...], int]]:
        """The groups and the number of tasks of each total."""
        return [(total.groups, total.tasks) for total in await self.source.sum_usage(query, by)]


async def settle(store: Store, records: Sequence[UsageRecord]) -> None:
    """Runs the tasks of records."""
    for wallet in {each.wallet for each in records}:
        await store.add_account(wallet.account, "pro", 1.0)
        await store.grant(Grant(f"credits of {wallet}", wallet, 10**9, 1.0))
    for each in records:
        await store.reserve(ReserveRequest(replace(each, cost=0), 0, 0))
        assert (await store.settle(Settlement(each))).record == each


@pytest.fixture(params=[*STORES, *(f"{kind} archive" for kind in ARCHIVES)])
async def sums(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Sums]:
    """Each store and each archive, without records."""
    async with AsyncExitStack() as stack:
        if request.param in STORES:
            rig = STORES[request.param](tmp_path)
            await rig.open()
            stack.push_async_callback(rig.close)
            yield Sums(rig.store, partial(settle, rig.store))
        else:
            url = await new_url(request, request.param.removesuffix(" archive"), tmp_path)
            archive = await stack.enter_async_context(open_archive(url))
            yield Sums(archive, archive.add)


def tagged(task_id: str, pairs: Mapping[str, str], **changes: Any) -> UsageRecord:
    """A record with metadata."""
    return record(task_id, metadata=encode_metadata(pairs), **changes)


def expected(records: Sequence[UsageRecord], query: UsageQuery, by: Sequence[Grouping]) -> list[UsageTotal]:
    """The totals of these records."""
    found: dict[tuple[str, ...], list[UsageRecord]] = defaultdict(list)
    for each in records:
        if query.account in (None, each.account) and query.live in (None, each.live):
            found[tuple(group(each, grouping) for grouping in by)].append(each)
    summed = [field.name for field in fields(UsageTotal)][2:]
    return [
        UsageTotal(groups, len(of), *[sum(getattr(each, name) for each in of) for name in summed])
        for groups, of in sorted(found.items())
    ]


def group(of: UsageRecord, grouping: Grouping) -> str:
    """What a record has in a grouping."""
    if isinstance(grouping, MetadataKey):
        return decode_metadata(of.metadata).get(grouping.name, "")
    names = {"key": "key_id", "protocol": "wire"}
    values: dict[str, str] = {
        "day": datetime.fromtimestamp(of.at, UTC).strftime("%Y-%m-%d"),
        "mode": "live" if of.live else "test",
    }
    return values.get(grouping) or str(getattr(of, names.get(grouping, grouping)))


# --- groups


async def test_records_are_grouped_by_two_dimensions(sums: Sums) -> None:
    await sums.add([
        record("a", at=DAY - 0.001, cost=1, reasoning_tokens=1, cache_write_1h_input_tokens=10),
        record("b", at=DAY, cost=10, model="claude", reasoning_tokens=2),
        record("c", at=DAY + 1, cost=100, reasoning_tokens=4),
        record("d", at=DAY + 2, cost=1_000, reasoning_tokens=8, cache_write_1h_input_tokens=20),
    ])  # fmt: skip

    async def costs(*by: Grouping) -> list[tuple[tuple[str, ...], int]]:
        return [(total.groups, total.cost) for total in await sums.source.sum_usage(ALL, by)]

    assert await costs("model", "day") == [
        (("claude", "1970-01-02"), 10),
        (("gpt-4", "1970-01-01"), 1),
        (("gpt-4", "1970-01-02"), 1_100),
    ]
    assert await costs("day", "model") == [
        (("1970-01-01", "gpt-4"), 1),
        (("1970-01-02", "claude"), 10),
        (("1970-01-02", "gpt-4"), 1_100),
    ]
    totals = await sums.source.sum_usage(ALL, ("day",))
    assert [(total.reasoning_tokens, total.cache_write_1h_input_tokens) for total in totals] == [
        (1, 10),
        (14, 20),
    ]


@pytest.mark.parametrize(
    ("by", "changes", "groups"),
    [
        ("user", [{"user": "ada"}, {"user": ""}, {"user": "Ada"}], ["", "Ada", "ada"]),
        ("task_type", [{"task_type": "text"}, {"task_type": "image"}], ["image", "text"]),
        ("provider", [{"provider": "openai"}, {"provider": ""}], ["", "openai"]),
        ("mode", [{"live": True}, {"live": False}], ["live", "test"]),
        ("protocol", [{"wire": "rest"}, {"wire": "grpc"}], ["grpc", "rest"]),
        ("account", [{"account": "bee"}, {"account": "acme"}], ["acme", "bee"]),
        ("key", [{"key_id": "k2"}, {"key_id": "k1"}], ["k1", "k2"]),
        ("model", [{"model": "gpt-4"}, {"model": "claude"}], ["claude", "gpt-4"]),
        ("day", [{"at": DAY}, {"at": DAY - 0.001}], ["1970-01-01", "1970-01-02"]),
    ],
)
async def test_a_dimension_groups_by_its_column(
    sums: Sums, by: Dimension, changes: list[dict[str, Any]], groups: list[str]
) -> None:
    await sums.add([record(f"t{n}", **each) for n, each in enumerate(changes)])
    assert await sums.tasks(by) == [((name,), 1) for name in groups]


async def test_records_without_the_metadata_key_are_in_the_empty_group(sums: Sums) -> None:
    await sums.add([
        tagged("a", {"team": "red"}),
        tagged("b", {"team": "blue", "order": "7"}),
        tagged("c", {"team": "red", "order": ""}),
        tagged("d", {"order": "7"}),
        tagged("e", {}, user="red"),
    ])  # fmt: skip
    assert await sums.tasks(TEAM) == [(("",), 2), (("blue",), 1), (("red",), 2)]
    assert await sums.tasks(MetadataKey("order")) == [(("",), 3), (("7",), 2)]
    assert await sums.tasks(MetadataKey("tea")) == [(("",), 5)]


async def test_metadata_keys_and_dimensions_are_combined(sums: Sums) -> None:
    await sums.add([
        tagged("a", {"team": "red", "model": "x"}),
        tagged("b", {"team": "red"}, model="claude"),
        tagged("c", {"team": "blue", "user": "y"}, user="ada"),
        record("d"),
    ])  # fmt: skip
    assert await sums.tasks(TEAM, "model") == [
        (("", "gpt-4"), 1),
        (("blue", "gpt-4"), 1),
        (("red", "claude"), 1),
        (("red", "gpt-4"), 1),
    ]
    assert await sums.tasks(MetadataKey("user"), "user", MetadataKey("model"), "model") == [
        (("", "", "", "claude"), 1),
        (("", "", "", "gpt-4"), 1),
        (("", "", "x", "gpt-4"), 1),
        (("y", "ada", "", "gpt-4"), 1),
    ]
    assert await sums.tasks("model", "model") == [(("claude", "claude"), 1), (("gpt-4", "gpt-4"), 3)]
    query = UsageQuery(account="acme", live=True, model="gpt-4", since=0.0, until=1.0)
    assert await sums.tasks(TEAM, query=query) == [(("",), 1), (("blue",), 1), (("red",), 1)]
    assert await sums.tasks(TEAM, "mode", query=UsageQuery(live=False)) == []


async def test_any_text_is_a_metadata_key_and_finds_its_own_values_alone(sums: Sums) -> None:
    odd = [tagged(f"t{n}", {key: f"value of {key}", "common": key}) for n, key in enumerate(ODD_KEYS)]
    many = [tagged(f"many {n}", {key: key for key in ODD_KEYS[n : n + 15]}) for n in range(0, 45, 15)]
    await sums.add([*odd, *many])
    for key in ODD_KEYS:
        values = sorted({"", key, f"value of {key}"})
        assert [groups for groups, _ in await sums.tasks(MetadataKey(key))] == [(name,) for name in values]
        assert await sums.tasks(MetadataKey(key), "user", MetadataKey(key)) == [
            ((name, "", name), tasks) for (name,), tasks in await sums.tasks(MetadataKey(key))
        ]
    common = [((key,), 1 if key else 1 + len(many)) for key in sorted(ODD_KEYS)]
    assert await sums.tasks(MetadataKey("common")) == common
    assert await sums.tasks(MetadataKey("user")) == [(("",), len(odd) + len(many))]


async def test_without_groupings_there_is_one_total_of_all_records(sums: Sums) -> None:
    assert await sums.tasks() == []
    await sums.add([record("a", cost=3, at=5.0), record("b", cost=4, model="claude", live=False, at=7.0)])
    (total,) = await sums.source.sum_usage(ALL, ())
    assert (total.groups, total.tasks, total.cost) == ((), 2, 7)
    assert await sums.source.sum_usage(ALL, (), limit=1) == [total]
    assert await sums.source.sum_usage(ALL, (), after=()) == []
    assert await sums.tasks(query=UsageQuery(until=6.0)) == [((), 1)]
    assert await sums.tasks(query=UsageQuery(account="nobody")) == []


# --- pages


@pytest.mark.parametrize(
    "by", [("user",), ("user", TEAM), (TEAM, "user", MetadataKey("x")), ("mode", TEAM, "user", "model")]
)
async def test_pages_of_groups_with_equal_beginnings_are_the_whole(
    sums: Sums, by: tuple[Grouping, ...]
) -> None:
    names = ["", "a", "a ", "a!", "ab", "A", "\uffff", "\U0001f600"]
    records = [
        tagged(f"{user} {team}", {"team": team, "x": user[:1]} if team else {}, user=user, cost=1)
        for user in names
        for team in names
    ]
    await sums.add(records)
    whole = await sums.source.sum_usage(ALL, by)
    assert whole == expected(records, ALL, by)
    for limit in (1, 3, 7, len(whole), 100):
        found: list[UsageTotal] = []
        after = None
        while page := await sums.source.sum_usage(ALL, by, limit=limit, after=after):
            assert len(page) <= limit
            found += page
            after = page[-1].groups
        assert found == whole
    # A page may start after groups that no record has.
    for missing in (tuple("a" for _ in by), tuple("" for _ in by), (*("\U0010ffff" for _ in by),)):
        following = [total for total in whole if total.groups > missing]
        assert await sums.source.sum_usage(ALL, by, after=missing) == following


async def test_any_groupings_of_any_records_give_the_sums_of_their_groups(sums: Sums) -> None:
    generator = random.Random(11)
    texts = ["", "a", "b", '"', "ü", "\U0001f600"]
    records = [
        tagged(
            f"t{n}",
            {key: generator.choice(texts) for key in generator.sample(ODD_KEYS, generator.randrange(4))},
            account=generator.choice(("acme", "bee")), live=generator.random() < 0.5, user=generator.choice(texts),
            model=generator.choice(("gpt-4", "claude")), key_id=generator.choice(("k1", "k2")), at=n * DAY / 20,
            wire=generator.choice(("rest", "grpc")), task_type=generator.choice(("text", "image")),
            provider=generator.choice(texts), cost=generator.randrange(99), input_tokens=n, output_tokens=2 * n,
            reasoning_tokens=n, cached_input_tokens=n // 2, cache_write_input_tokens=n // 3, audio_ms=n,
            cache_write_1h_input_tokens=n // 4, characters=n, images=1, output_bytes=generator.randrange(10**12),
        )
        for n in range(80)
    ]  # fmt: skip
    await sums.add(records)
    keys = [MetadataKey(key) for key in ODD_KEYS]
    for _ in range(60):
        by = tuple(
            generator.choice([*DIMENSIONS, *generator.sample(keys, 6)])
            for _ in range(generator.randrange(MAX_GROUPINGS + 1))
        )
        query = UsageQuery(
            account=generator.choice((None, "acme", "bee")), live=generator.choice((None, True, False))
        )
        whole = expected(records, query, by)
        assert await sums.source.sum_usage(query, by) == whole
        if whole:
            after = generator.choice(whole).groups
            following = [total for total in whole if total.groups > after]
            assert await sums.source.sum_usage(query, by, limit=5, after=after) == following[:5]


# --- errors


@pytest.mark.parametrize(
    ("by", "after", "message"),
    [
        (("wire",), None, "by must be of model, key, day"),
        (("team",), None, "by must be of model, key, day"),
        (("model", ""), None, "by must be of model, key, day"),
        ("model", None, "by must be of model, key, day"),
        (("model",) * 5, None, "at most 4"),
        (("model", "day"), ("gpt-4",), "after"),
        (("model",), ("gpt-4", "x"), "after"),
        (("model",), (), "after"),
        ((), ("gpt-4",), "after"),
    ],
)
async def test_wrong_groupings_and_pages_are_errors(sums: Sums, by: Any, after: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        await sums.source.sum_usage(ALL, by, after=after)


@pytest.mark.parametrize("text", ["\0", "a\0b", "\ud800", "a\udfff"])
def test_metadata_has_no_nul_and_no_half_of_a_surrogate_pair(text: str) -> None:
    for wrong in ({text: ""}, {"key": text}, {"a": "b", "c": text}):
        with pytest.raises(ValueError, match=r"NUL|surrogates"):
            encode_metadata(wrong)
    with pytest.raises(ValueError, match=r"NUL|surrogates"):
        MetadataKey(text)


def test_metadata_is_encoded_in_one_way_and_read_back() -> None:
    pairs = {key: f"{key} {n}" for n, key in enumerate(ODD_KEYS)}
    shuffled = dict(random.Random(1).sample(list(pairs.items()), len(pairs)))
    assert decode_metadata(encode_metadata(shuffled)) == pairs
    assert encode_metadata(shuffled) == encode_metadata(pairs)
    assert encode_metadata({"b": 'é"', "a": "\U0001f600"}) == '{"a":"\U0001f600","b":"é\\""}'
    assert encode_metadata({}) == ""
    assert decode_metadata("") == {}
