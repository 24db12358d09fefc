"""Generators of other languages take all protobuf files, as they are and with every later feature."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from tests import node_client
from tests.protobuf.additions import FEATURES, add_feature
from tests.protobuf.contract import ROOT, Contract

PAGE = (ROOT / "docs" / "protobuf.md").read_text()
JAVA_RUNTIME = Path("/usr/share/java/protobuf.jar")


@pytest.fixture(scope="module", params=[(), FEATURES], ids=["as it is", "with every later feature"])
def contract(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Contract:
    """The protobuf files."""
    contract = Contract(tmp_path_factory.mktemp("contract"))
    for feature in request.param:
        add_feature(contract, feature)
    return contract


@pytest.fixture(scope="module")
def files(contract: Contract) -> list[FileDescriptorProto]:
    """The descriptors of the protobuf files."""
    built, output = contract.run("buf", "build", "--output", "contract.binpb")
    assert built, output
    compiled = FileDescriptorSet.FromString((contract.folder / "contract.binpb").read_bytes()).file
    return [file for file in compiled if file.name in contract.names()]


@pytest.fixture(scope="module")
def managed(contract: Contract) -> Path:
    """The folder of what `buf generate` generates with the buf.gen.yaml of docs/protobuf.md."""
    needs("protoc", "protoc-gen-go", "protoc-gen-go-grpc")
    (contract.folder / "buf.gen.yaml").write_text(template())
    generated, output = contract.run("buf", "generate")
    assert generated, output
    return contract.folder / "gen"


def template() -> str:
    """Returns the buf.gen.yaml of docs/protobuf.md."""
    (found,) = re.findall(r"^```yaml\n(version: .*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def needs(*commands: str) -> None:
    """Skips the test if a command is missing."""
    for command in commands:
        if shutil.which(command) is None:
            pytest.skip(
                f"{command} is not on this machine; on Debian as root `make generators` installs protoc's plugins"
            )


def include_folders(contract: Contract) -> list[str]:
    """Returns the folders that have the files and what they import."""
    return [name for name in ("proto", "third_party") if (contract.folder / name).exists()]


def protoc(contract: Contract, plugins: Iterable[str]) -> Path:
    """Runs the protoc of grpcio-tools, without buf's managed mode; returns the folder of what it generated."""
    target = contract.folder / "-".join(plugins)
    target.mkdir()
    includes = [f"-I{folder}" for folder in include_folders(contract)]
    outputs = [f"--{plugin}_out={target}" for plugin in plugins]
    result = contract.run("python", "-m", "grpc_tools.protoc", *includes, *outputs, *contract.names())
    assert result == (True, "")
    return target


def texts(folder: Path, suffix: str) -> dict[str, str]:
    """Returns the texts of the files with a suffix, by their paths below a folder."""
    paths = [path for path in folder.rglob(f"*{suffix}") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def stems(files: Iterable[FileDescriptorProto], suffix: str, *, services: bool = False) -> set[str]:
    """Returns the names of all files, or of those with a service, with a suffix in place of `.proto`."""
    return {file.name.removesuffix(".proto") + suffix for file in files if file.service or not services}


def type_names(file: FileDescriptorProto) -> list[str]:
    """Returns the names of a file's messages and enums."""
    return [*(message.name for message in file.message_type), *(enum.name for enum in file.enum_type)]


def test_every_file_has_the_options_of_its_package(files: Iterable[FileDescriptorProto]) -> None:
    for file in files:
        parts = file.package.split(".")
        assert Path(file.name).parent == Path(*parts)
        assert file.options.go_package == f"{'/'.join(parts)};{''.join(parts[-2:])}"
        assert file.options.java_package == file.package
        assert file.options.java_multiple_files
        assert file.options.csharp_namespace == ".".join(part.capitalize() for part in parts)


def test_grpcio_tools_generate_python(contract: Contract, files: Iterable[FileDescriptorProto]) -> None:
    generated = texts(protoc(contract, ["python", "pyi", "grpc_python"]), "")
    expected = [stems(files, end) for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")]
    assert set(generated) == set.union(*expected)


def test_go_is_generated_without_managed_mode(
    contract: Contract, files: Iterable[FileDescriptorProto]
) -> None:
    needs("protoc-gen-go", "protoc-gen-go-grpc")
    check_go(texts(protoc(contract, ["go", "go-grpc"]), ".go"), files)


def test_go_is_generated_for_the_module_of_the_caller(
    managed: Path, files: Iterable[FileDescriptorProto]
) -> None:
    check_go(generated := texts(managed / "go", ".go"), files)
    imported = set(re.findall(r'"(\S*pomelo/\S*v\d)"', "".join(generated.values())))
    # Each is the folder of a package below the module.
    folders = {path.removeprefix("example.com/you/") for path in imported}
    assert folders >= {"gen/go/pomelo/v1"}
    assert all((managed.parent / folder).is_dir() for folder in folders)


def check_go(generated: Mapping[str, str], files: Iterable[FileDescriptorProto]) -> None:
    """Checks the names of Go's files and packages."""
    assert set(generated) == stems(files, ".pb.go") | stems(files, "_grpc.pb.go", services=True)
    for name, text in generated.items():
        package = "".join(Path(name).parts[-3:-1])
        assert re.search(rf"^package {package}$", text, re.MULTILINE)


def test_java_is_generated(managed: Path, files: Iterable[FileDescriptorProto]) -> None:
    generated = texts(managed / "java", ".java")
    for file in files:
        package = Path("com/example", Path(file.name).parent)
        assert {str(package / f"{name}.java") for name in type_names(file)} <= set(generated)


@pytest.mark.parametrize("contract", [FEATURES], indirect=True, ids=["with every later feature"])
def test_java_compiles(managed: Path, contract: Contract, tmp_path: Path) -> None:
    needs("javac")
    if not JAVA_RUNTIME.exists():
        pytest.skip(
            "libprotobuf-java is not on this machine; on Debian as root `make generators` installs it"
        )
    assert contract.run("buf", "generate", "third_party", "--output", str(tmp_path)) == (True, "")
    sources = [str(path) for folder in (managed, tmp_path) for path in folder.rglob("*.java")]
    options = [
        "-J-XX:TieredStopAtLevel=1",
        "-proc:none",
        "-d",
        str(tmp_path),
        "-classpath",
        str(JAVA_RUNTIME),
    ]
    compiled, output = contract.run("javac", *options, *sources)
    assert compiled, output


def test_csharp_is_generated(managed: Path, files: Iterable[FileDescriptorProto]) -> None:
    expected = {}
    for file in files:
        namespace = ".".join(part.capitalize() for part in file.package.split("."))
        name = "".join(word.capitalize() for word in Path(file.name).stem.split("_"))
        expected[f"{namespace.replace('.', '/')}/{name}.cs"] = f"\nnamespace {namespace} {{\n"
    generated = texts(managed / "csharp", ".cs")
    assert set(generated) == set(expected)
    assert all(expected[name] in text for name, text in generated.items())


def test_managed_mode_changes_the_options_in_the_generated_code(contract: Contract) -> None:
    # By protoc's plugin for Python, which every machine has.
    managed = template().partition("plugins:")[0]
    plugin = (
        "  - protoc_builtin: python\n    protoc_path: [python, -m, grpc_tools.protoc]\n    out: managed\n"
    )
    (contract.folder / "managed.yaml").write_text(f"{managed}plugins:\n{plugin}")
    assert contract.run("buf", "generate", "--template", "managed.yaml") == (True, "")
    text = (contract.folder / "managed/pomelo/v1/text_pb2.py").read_text()
    assert "example.com/you/gen/go/pomelo/v1;pomelov1" in text
    assert "com.example.pomelo.v1" in text


async def test_node_loads_every_file(
    contract: Contract, files: Iterable[FileDescriptorProto], request: pytest.FixtureRequest
) -> None:
    modules = node_client.install(Path(request.config.cache.mkdir("node")))
    folders = [str(contract.folder / name) for name in include_folders(contract)]
    loaded = await node_client.run(modules, "load.cjs", {"folders": folders, "names": contract.names()})
    expected: dict[str, dict[str, list[str]] | None] = {}
    for file in files:
        expected |= {f"{file.package}.{name}": None for name in type_names(file)}
        for service in file.service:
            expected[f"{file.package}.{service.name}"] = {
                method.name: [
                    "stream " * method.client_streaming + method.input_type.rpartition(".")[2],
                    "stream " * method.server_streaming + method.output_type.rpartition(".")[2],
                ]
                for method in service.method
            }
    assert {name: methods for name, methods in loaded.items() if name.startswith("pomelo.")} == expected
