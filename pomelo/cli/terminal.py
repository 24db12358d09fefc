"""The terminal: options of several commands, tables, JSON, progress, and errors as one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from pomelo.cli.safe_text import visible, visible_json

if TYPE_CHECKING:
    from pomelo.gen.v1.task_pb2 import TaskType
    from pomelo.gen.v1.usage_pb2 import Mode


_MAY_BE_EMPTY = frozenset({"models", "name", "note"})
"""Parameters that may be given as an empty text. The server refuses an empty list of models."""


class _Command(TyperCommand):
    """A command whose optional texts may be absent but not empty: a script whose variable is empty does not
    mean a key without a limit, or the tasks of all accounts."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            rest = super().parse_args(ctx, args)
        except typer.BadParameter as error:
            _explain_refusal(error)
            raise
        for parameter in self.params:
            name = parameter.name or ""
            value, source = ctx.params.get(name), ctx.get_parameter_source(name)
            if parameter.required or name in _MAY_BE_EMPTY or ctx.resilient_parsing:
                continue
            if isinstance(value, str) and not value.strip() and source.name == "COMMANDLINE":
                expected = "must not be empty. Give a value, or leave it out"
                raise typer.BadParameter(expected, ctx=ctx, param_hint=parameter.opts[-1])
        return rest


def _explain_refusal(error: typer.BadParameter) -> None:
    """Replaces pydantic's text in an error of a parameter by the one that settings have."""
    from pydantic import ValidationError

    from pomelo.settings.types import describe_refusal

    if isinstance(error.__cause__, ValidationError):
        problem = error.__cause__.errors(include_url=False)[0]
        error.message = describe_refusal(problem["type"], problem["msg"])


class Commands(typer.Typer):
    """The commands of one noun, or all of them."""

    def __init__(self, summary: str, **options: Any) -> None:
        # Rich takes longer to load than the rest of `pomelo --help`.
        super().__init__(help=summary, no_args_is_help=True, rich_markup_mode=None, **options)

    def add(self, name: str, command: Callable[..., None], **options: Any) -> None:
        self.command(name, cls=_Command, **options)(command)


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        envvar="POMELO_CONFIG",
        help="The settings file. Default: pomelo.toml if it exists. Variables override it.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="The gRPC server. Default: that of the settings. With TLS, unless it is on this machine.",
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Use TLS, and trust this authority (PEM). Default: the well-known ones.",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar="POMELO_KEY",
        metavar="KEY",
        show_envvar=True,
        help="An API key. Default: the test key that pomelo serve stored in the data folder.",
    ),
]


_GAP = "  "
"""Between two columns of a table."""


class FailureError(Exception):
    """The command failed. The message is one line that says why and what to do."""


def explain(error: Exception) -> str:
    """Returns the line to print for an error that a user can fix.

    Raises:
        Exception: the error itself, if it is an internal one.
    """
    # Looked up, not imported: a class whose module is not loaded can't have been raised.
    expected = tuple(
        getattr(module, name)
        for module_name, name in (("pomelo.settings", "SettingsError"), ("pomelo.stores.base", "StoreError"))
        if (module := sys.modules.get(module_name)) is not None
    )
    if isinstance(error, (FailureError, *expected)):
        return str(error)
    errors = sys.modules.get("pomelo.errors")
    if errors is not None and isinstance(error, errors.PomeloError):
        return f"{error.code}: {error.message}"
    if isinstance(error, OSError):
        prefix = f"{error.filename}: " if error.filename else ""
        return prefix + (error.strerror or str(error))
    if isinstance(error, UnicodeEncodeError) and error.encoding == "utf-8":
        return f"{error.object[:100]} is not UTF-8 text"  # an argument: protobuf takes no other text
    raise error


def print_line(line: str, *, err: bool = False) -> None:
    """Prints one line, with escapes for control characters."""
    typer.echo(visible(line), err=err)


def discard_output() -> None:
    """Drops what could not be printed, and all that follows: the interpreter would try again when it ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


@contextmanager
def reporting(change: str, remedy: str = "") -> Iterator[None]:
    """While a command prints what it has changed: if that fails, the error says that the `change` was made,
    because a user who does not know would make it again. `remedy` is a sentence that says what to do then.

    Raises:
        FailureError: the output can't be written.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        discard_output()
        why = f"{change}, but the output can't be written: {error.strerror}"
        raise FailureError(f"{why}. {remedy}" if remedy else why) from error


def print_json(value: Any) -> None:
    """Prints a value as indented JSON, or JSON text as it is."""
    text = value.decode() if isinstance(value, bytes) else json.dumps(value, indent=2, ensure_ascii=False)
    typer.echo(visible_json(text))


def print_array(values: Iterable[Any]) -> None:
    """Prints values, or their JSON texts, as a JSON array, each on its own line as soon as it arrives."""
    separator = "[\n  "
    for value in values:
        text = value.decode() if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False)
        sys.stdout.write(separator + visible_json(text))
        separator = ",\n  "
    sys.stdout.write("[]\n" if separator.startswith("[") else "\n]\n")


def print_pages(
    header: Sequence[str], pages: Iterable[Sequence[Sequence[str]]], *, optional: Sequence[str] = ()
) -> None:
    """Prints the rows of all pages as one table, each page as soon as it arrives. Its columns are as wide as
    their widest cell so far.

    On a terminal that is too narrow for the first page, the `optional` columns are left out, the first one
    first, until the rest fits; if it never does, cells take several lines.
    """
    available = get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    widths = dict.fromkeys(header, 0)
    for number, rows in enumerate(pages):
        lines = [[visible(cell) for cell in row] for row in (rows if number else [header, *rows])]
        columns = {name: [line[n] for line in lines] for n, name in enumerate(header) if name in widths}
        widths = {name: max([widths[name], *map(_cell_width, columns[name])]) for name in columns}
        for name in () if number else optional:
            if _line_width(widths) > available and name in columns:
                del columns[name], widths[name]
        if _line_width(widths) > available:
            _print_wrapped(columns, available, with_header=not number)
        else:
            _print_aligned(columns, widths)
    if left_out := len(header) - len(widths):
        typer.echo(f"({counted(left_out, 'column')} left out: widen the terminal, or use --json.)", err=True)


def _line_width(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + len(_GAP) * (len(widths) - 1)


def _cell_width(text: str) -> int:
    """Returns the columns of a terminal that a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _print_aligned(columns: Mapping[str, Sequence[str]], widths: Mapping[str, int]) -> None:
    for row in zip(*columns.values(), strict=True):
        cells = (
            cell + " " * (width - _cell_width(cell)) for cell, width in zip(row, widths.values(), strict=True)
        )
        typer.echo(_GAP.join(cells).rstrip())


def _print_wrapped(columns: Mapping[str, Sequence[str]], width: int, *, with_header: bool) -> None:
    """Prints a table whose cells take several lines where they must, with a line between two rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None, pad_edge=False, show_edge=False, padding=(0, len(_GAP), 0, 0), show_header=with_header
    )
    for name in columns:
        table.add_column(name, overflow="fold", header_style="none")
    for row in zip(*(cells[with_header:] for cells in columns.values()), strict=True):
        table.add_row(*map(Text, row))
    Console(width=width, color_system=None, highlight=False).print(table)


def parse_time(text: str) -> float | None:
    """Returns Unix seconds of an ISO date or time, in UTC unless it names a zone; None if it is neither, or
    beyond the years 1 to 9999 in UTC."""
    from pomelo.protobuf.times import MAX_SECONDS, MIN_SECONDS

    try:
        moment = datetime.fromisoformat(text)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
    return seconds if MIN_SECONDS <= seconds < MAX_SECONDS + 1 else None


def read_time(text: str, hint: str, field: Any) -> None:
    """Sets a Timestamp to the date or time that an option gives.

    Raises:
        typer.BadParameter: it is neither; `hint` names the option.
    """
    from pomelo.protobuf.times import to_timestamp

    seconds = parse_time(text)
    if seconds is None:
        expected = "is not a date or time such as 2026-11-24 or 2026-11-24T12:00Z"
        raise typer.BadParameter(f"{text!r} {expected}", param_hint=hint)
    field.CopyFrom(to_timestamp(seconds))


def format_time(message: Any, field: str) -> str | None:
    """Returns a Timestamp field as text in UTC, None if it is absent."""
    if not message.HasField(field):
        return None
    text: str = getattr(message, field).ToDatetime().strftime("%Y-%m-%dT%H:%M:%SZ")
    return text


def unix_time(message: Any, field: str) -> int | None:
    """Returns a Timestamp field in whole Unix seconds, as REST has it; None if it is absent."""
    return getattr(message, field).seconds if message.HasField(field) else None


def counted(number: int, noun: str) -> str:
    """Returns a number with what it counts, such as `1 key` or `2 keys`; `noun` is the singular."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def task_type_name(task_type: TaskType.ValueType) -> str:
    """Returns the name of a task type in the API, such as text-to-speech."""
    from pomelo.gen.v1.task_pb2 import TaskType

    return value_name(TaskType, task_type).replace("_", "-")


def mode_name(mode: Mode.ValueType) -> str:
    """Returns the name of a mode, such as live."""
    from pomelo.gen.v1.usage_pb2 import Mode

    return value_name(Mode, mode)


def value_name(enum: Any, value: int) -> str:
    """Returns the short name of an enum's value, such as live; the number of one that is newer than this
    command."""
    from pomelo.protobuf.enums import enum_names

    return enum_names(enum.DESCRIPTOR).get(value, str(value) if value else "unspecified")


class Progress:
    """A line on stderr that changes, if stderr is a terminal. Leaving the context clears it."""

    def __init__(self) -> None:
        self._shown = False
        self._terminal = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self._terminal:
            self._shown = True
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Clears the line, so that other output does not share it."""
        if self._shown:
            self._shown = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()
