"""Console entry points: `alro-fast train` is `python -m alro_fast.train`, and so on."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from . import __version__
from .errors import AlroFastError, Stopped
from .processes.elastic import end_with_launcher, tell_launcher
from .processes.launch import is_first, speaks
from .texts import printable

# Torch's threads read this once, when torch is imported. Beside other work, threads that spin while they wait slow the
# commands down tenfold; alone, threads that sleep cost next to nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = {
    "prepare": "ratings -> ranking lists",
    "first_stage": "ratings -> a retriever's candidates with hints (RecRanker)",
    "train": "tune a ranker; without options the demo, half a minute on a CPU",
    "evaluate": "how good its rankings are, beside the baselines",
    "rank": "order the candidates of a JSON list",
    "report": "report.html of a run, of an evaluation, or of two compared",
    "study": "options x seeds over training runs, in one table of differences",
    "client": "rank through an inference server",
    "doctor": "versions, backends and devices here; what is fused for a model",
}


_OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|[Cc]annot allocate memory|not enough memory")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like every other mistake's; options are written in full.

    What it returns also has `given`: the names of the options that were written, whatever their values.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        settings: dict[str, Any] = {"allow_abbrev": False, "formatter_class": _Help} | options
        super().__init__(*args, **settings)

    def parse_args(  # type: ignore[override]  # no namespace is filled that others made
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        absent = object()
        names = {action.dest: action.default for action in self._actions if action.dest != "help"}
        space, unknown = self.parse_known_args(args, argparse.Namespace(**dict.fromkeys(names, absent)))
        if unknown:
            close = difflib.get_close_matches(unknown[0].split("=")[0][:80], self._option_string_actions, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        found = vars(space)
        given = tuple(name for name in names if found[name] is not absent)
        return argparse.Namespace(**names | {name: found[name] for name in given}, given=given)

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse's own is silent where it cannot write

    def error(self, message: str) -> NoReturn:
        raise AlroFastError(f"{message}; {self.prog} --help lists the options")


class Reader(NamedTuple):
    """Who reads an option that not everybody reads.

    The refusal is "--beams is no option of method first (it is read by method beam); leave it out", of `by` "by method
    beam" and `here` "method {0.method}", formatted with the setting that `reads` is asked about.
    """

    by: str
    here: str
    reads: Callable[[Any], bool]


def refuse_unread(given: Iterable[str], readers: Mapping[str, Reader], setting: Any, *others: Any) -> None:
    """AlroFastError for a given option that no setting reads: an option changes what a command does, or is refused."""
    for name in given:
        reader = readers.get(name)
        if reader is not None and not any(map(reader.reads, (setting, *others))):
            here = reader.here.format(setting)
            raise AlroFastError(f"--{name} is no option of {here} (it is read {reader.by}); leave it out")


class _Help(argparse.RawDescriptionHelpFormatter):
    """A usage line of what must be given, and every option's default beside it."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 32} | options)

    def _format_usage(self, usage: Any, actions: Iterable[argparse.Action], groups: Any, prefix: Any) -> str:
        needed = [action for action in actions if action.required or not action.option_strings]
        return super()._format_usage(usage, needed, [], prefix).rstrip() + " [options]\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs in the terminal's width; those that show something, and so have indented lines, as they are."""
        paragraphs = text.strip().split("\n\n")
        shown = (re.search(r"^\s", one, flags=re.M) for one in paragraphs)
        return "\n\n".join(
            one if raw else textwrap.fill(one, width, break_on_hyphens=False, break_long_words=False)
            for one, raw in zip(paragraphs, shown)
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        switch_or_none = action.default is None or isinstance(action.default, bool) or not action.option_strings
        if switch_or_none or action.default == argparse.SUPPRESS or "default" in (action.help or ""):
            return action.help
        return f"{action.help or ''} (default: %(default)s)".lstrip()


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake, or a file that cannot be used, becomes one line on stderr and exit status 2.

    So does a lack of memory, of the machine's or of a device's. Of several processes only the first prints.
    """
    arguments = sys.argv[1:] if argv is None else argv
    end_with_launcher()
    _open_closed()
    try:
        try:
            for word in arguments:
                if "\0" in word:
                    raise AlroFastError(f"{word!r} holds a null character, which no name or value has")
            with contextlib.ExitStack() as held:
                screen = sys.stdout if is_first() else held.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                held.enter_context(contextlib.redirect_stdout(_Screen(screen)))
                main(arguments)
        finally:
            _flush()  # here, where a reader that has gone is no surprise
    except AlroFastError as error:
        _fail(str(error))
    except BrokenPipeError:  # who reads has read enough
        raise SystemExit(141) from None
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except Stopped as stopped:
        if str(stopped):
            print(printable(str(stopped)), file=sys.stderr)
        raise SystemExit(stopped.status) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (MemoryError, RuntimeError) as error:
        wanted = lack_of_memory(error)
        if wanted is None:
            raise
        _fail(f"there is not enough memory for this{wanted}; ask for less, such as fewer tokens in a batch")


def lack_of_memory(error: Exception) -> str | None:
    """What an error of a lack of memory says of it, such as " (tried to allocate 2.00 GiB)"; None for other errors."""
    if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
        return None
    wanted = re.search(r"[Tt]ried to allocate [\d.]+ ?\w+", str(error))
    return f" ({wanted[0].lower()})" if wanted else ""


def launch(command: str) -> NoReturn:
    """`python -m alro_fast.COMMAND`, before its imports: they take seconds, and Ctrl-C meanwhile is one line, too."""
    run(lambda words: _main_of(command)(words))
    raise SystemExit(0)


def _main_of(command: str) -> Callable[[Sequence[str]], None]:
    main: Callable[[Sequence[str]], None] = importlib.import_module(f"alro_fast.{command}").main
    return main


def _open_closed() -> None:
    """Something in the place of what a shell's <&- and 2>&- closed, before a file gets its number and its output."""
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  # for the whole process
    if closed:
        _fail("standard output is closed; give it a reader, or send it to a file")


def _flush() -> None:
    """What is printed, to who reads it. Where that cannot be, nothing more is written, not even at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


class _Screen(io.TextIOBase):
    """A stream on which names from files show, and do nothing: control characters are written as escapes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write("\n".join(map(printable, text.split("\n"))))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


def _fail(reason: str) -> NoReturn:
    """The line of a mistake, and exit status 2."""
    line = printable(" ".join(reason.split()))
    tell_launcher(line)
    if speaks():
        print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2) from None


def first_screen() -> str:
    """What `alro-fast` says of itself, in 80 columns."""
    lines = [f"alro_fast {__version__}: fine-tune a language model to rank a user's candidates", ""]
    lines += ["usage: alro-fast COMMAND [options]", ""]
    lines += [f"  {name:<12} {purpose}" for name, purpose in COMMANDS.items()]
    lines += ["", "alro-fast COMMAND --help lists its options. To begin: alro-fast train"]
    return "\n".join(lines)


def main() -> None:
    """`alro-fast COMMAND [options]`."""
    run(_command)


def _command(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(first_screen())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"alro_fast {__version__}")
        return
    if arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], (*COMMANDS, "--help", "--version"), n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
        raise AlroFastError(f"unknown command {arguments[0]!r}; {hint}")
    _main_of(arguments[0])(arguments[1:])


if __name__ == "__main__":
    main()
