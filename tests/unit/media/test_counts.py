"""What a store counts of its media stays right, whatever is called twice or fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomelo.media.quota import MediaLimits, Quota
from pomelo.media.store import MediaStore
from tests.unit.media.files import put


def test_a_file_that_is_discarded_twice_is_subtracted_once(store: MediaStore) -> None:
    put(store)
    before = store.quota.total
    for closings in (1, 2, 3):
        writer = store.writer("ann", "image/png")
        writer.write(b"x" * 10_000)
        assert store.quota.total == before + 12_288
        for _ in range(closings):
            writer.close()
        assert store.quota.total == before


def test_counts_are_never_negative(tmp_path: Path) -> None:
    quota = Quota(tmp_path, MediaLimits(total=100, account=100, reserve=0))
    quota.add(b"ann", 10)
    quota.remove(b"ann", 50)
    assert (quota.stored(b"ann"), quota.total) == (0, 0)
    quota.add(b"ann", 100)
    assert (quota.stored(b"ann"), quota.total) == (100, 100)


async def test_changes_are_noted_only_during_a_scan(store: MediaStore) -> None:
    await store.refresh()
    put(store)
    assert store._changes is None
    store.folder.rename(store.folder.with_name("gone"))
    store.folder.touch()
    with pytest.raises(FileExistsError):
        await store.refresh()
    assert store._changes is None
