"""Stubs that a caller generated from the protobuf files can be imported beside an installed Pomelo."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.protobuf.contract import ENVIRONMENT, ROOT, Contract

(GENERATE,) = re.findall(
    r"^```bash\n(.*python -m grpc_tools\.protoc .*?)^```",
    (ROOT / "docs" / "protobuf.md").read_text(),
    re.DOTALL | re.MULTILINE,
)
# Without site and PYTHONPATH, the project itself is not on sys.path, though it is installed editable.
PYTHON = (sys.executable, "-E", "-S", "-c")
DEPENDENCIES = [path for path in sys.path if path.endswith("site-packages")]
# Its arguments: folders to put on sys.path, modules to import first.
START = """
import importlib, sys
sys.path[1:1] = sys.argv[1].split(":")
for name in sys.argv[2].split():
    importlib.import_module(name)
"""
USE = """
import pomelo, pomelo.gen.v1.task_service_pb2 as own, pomelo.v1.task_service_pb2 as stubs
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub as Own
from pomelo.v1.task_service_pb2_grpc import TaskServiceStub as Stubs
from pomelo.v1.task_pb2 import TaskSpec
request = stubs.RunTaskRequest(spec=TaskSpec(model="gpt-4"))
assert own.RunTaskRequest.FromString(request.SerializeToString()).spec.model == "gpt-4"
assert own.RunTaskRequest(spec=request.spec).spec.model == "gpt-4"
for module in (pomelo, own, stubs):
    print(module.__file__)
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stubs that the command of docs/protobuf.md generates."""
    return generate(Contract(tmp_path_factory.mktemp("contract")))


@pytest.fixture(scope="module", params=["editable", "wheel"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that an installation of Pomelo puts on sys.path."""
    if request.param == "editable":
        return ROOT
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", str(folder), str(ROOT)], check=True, env=ENVIRONMENT, timeout=270
    )
    (built,) = folder.glob("pomelo_tasks-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def generate(contract: Contract) -> Path:
    """Generates stubs; returns their folder."""
    generated, output = contract.run("sh", "-e", "-c", GENERATE)
    assert generated, output
    return contract.folder / "gen"


def run(
    folders: Sequence[Path], imports: Sequence[str], code: str, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process with these folders first on sys.path, after these imports."""
    search = ":".join([*map(str, folders), *DEPENDENCIES])
    command = [*PYTHON, START + code, search, " ".join(imports)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_the_documented_command_generates_modules_and_their_types(stubs: Path) -> None:
    stems = [
        str(path.relative_to(ROOT / "proto").with_suffix("")) for path in (ROOT / "proto").rglob("*.proto")
    ]
    generated = {str(path.relative_to(stubs)) for path in stubs.rglob("*") if path.is_file()}
    assert generated == {f"{stem}{end}" for stem in stems for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")}


def modules(folder: Path) -> list[str]:
    """Returns the generated modules of a folder on sys.path."""
    paths = sorted(path.relative_to(folder).with_suffix("") for path in folder.glob("pomelo/**/*_pb2*.py"))
    return [".".join(path.parts) for path in paths]


@pytest.mark.parametrize("own_first", [True, False], ids=["Pomelo first", "stubs first"])
@pytest.mark.parametrize(
    "path_first", [True, False], ids=["stubs last on sys.path", "stubs first on sys.path"]
)
def test_stubs_and_an_installed_pomelo_work_in_one_process(
    own_first: bool, path_first: bool, installed: Path, stubs: Path, tmp_path: Path
) -> None:
    folders = [installed, stubs] if path_first else [stubs, installed]
    own = [name for name in modules(installed) if name.startswith("pomelo.gen.")]
    generated = modules(stubs)
    assert len(own) > 10
    assert len(generated) > 20
    result = run(folders, [*own, *generated] if own_first else [*generated, *own], USE, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        str(installed / "pomelo/__init__.py"),
        str(installed / "pomelo/gen/v1/task_service_pb2.py"),
        str(stubs / "pomelo/v1/task_service_pb2.py"),
    ]


def test_without_stubs_the_package_is_its_own_folder(installed: Path, tmp_path: Path) -> None:
    result = run([installed], [], "import pomelo; print(pomelo.__path__)", tmp_path)
    assert (result.stdout, result.stderr) == (f"{[str(installed / 'pomelo')]}\n", "")


def test_a_module_of_pomelo_is_never_replaced_by_a_folder_of_the_caller(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "pomelo").mkdir()
    (tmp_path / "pomelo" / "errors.py").write_text("raise AssertionError")
    result = run([tmp_path, installed], ["pomelo.errors"], "", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("order", [1, -1], ids=["Pomelo first", "stubs first"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("double progress = 1;", "double progress = 1;\n  string other = 15;"),
        ("pomelo/v1;", "example.com/v1;"),
    ],
    ids=["another field", "another go_package"],
)
def test_stubs_of_other_files_are_refused_with_the_name_of_the_file(
    old: str, new: str, order: int, installed: Path, tmp_path: Path
) -> None:
    contract = Contract(tmp_path)
    contract.replace("pomelo/v1/image.proto", old, new)
    imports = ["pomelo.gen.v1.task_pb2", "pomelo.v1.task_pb2"][::order]
    result = run([installed, generate(contract)], imports, "", tmp_path)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("TypeError: ")
    assert last.endswith("duplicate file name pomelo/v1/image.proto")
