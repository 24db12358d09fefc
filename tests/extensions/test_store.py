"""A store is added as a package, a row in the table of stores, and a rig of the contract tests."""

from __future__ import annotations

from pathlib import Path

from tests.extensions.checkout import Checkout


def test_an_added_store_passes_the_contract_tests_and_serves_every_protocol(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    checkout.add_files("store")
    checkout.add_after(
        "pomelo/stores/__init__.py",
        "STORES: Mapping[str, str] = {",
        '    "folder://": "pomelo.stores.folder:open_folder",',
    )
    rig = "tests/contract/ledger_rig.py"
    checkout.add_after(
        rig,
        '"""The rig of each store."""',
        'from tests.contract.folder_rig import FolderRig\n\nSTORES["folder"] = FolderRig',
    )
    checkout.pytest("tests/check_store.py")
    checkout.pytest("tests/contract/test_ledger.py", "tests/contract/test_ledger_limits.py", "-k", "folder")
    assert checkout.additions() == {"pomelo/stores/__init__.py": 1, "pomelo/stores/folder/__init__.py": "new"}
