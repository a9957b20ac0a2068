"""The interactive shell: a prompt at which every line is a command, as in virsh."""

from __future__ import annotations

import contextlib
import io
import os
import readline
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hvsnap.cli import grammar
from hvsnap.cli.complaints import complain
from hvsnap.cli.session import Session
from hvsnap.errors import BadRequest

PROMPT = "hvsnap> "
HISTORY_MAX = 1000
OWN = ("help", "quit", "exit")
WRONG_USAGE = 2


Run = Callable[[Sequence[str], Session], int]
"""How a command line is run: its words, the options that apply before its own; its exit status."""


def without_command(given: grammar.NoCommand, run: Run) -> int:
    """Do what `hvsnap` alone means: the shell on a terminal, the help elsewhere. Return the exit status."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return converse(given.session, run)
    if given.session.json:
        return complain(BadRequest("no command was given", hint="`hvsnap --help` lists them"), "usage", as_json=True)
    with contextlib.redirect_stdout(sys.stderr):
        print(given.help(), end="")
    return WRONG_USAGE


def converse(session: Session, run: Run) -> int:
    """Read lines and run them until `quit` or the end of the input; an error does not end it."""
    if not session.quiet:
        print("Welcome to hvsnap. `help` lists the commands, `help COMMAND` explains one, `quit` ends.\n")
    with _line_editing(session):
        while True:
            try:
                line = input(PROMPT)
            except KeyboardInterrupt:
                print()
                continue
            except EOFError:
                print()
                return 0
            if not obey(line, session, run):
                return 0


def obey(line: str, session: Session, run: Run) -> bool:
    """Run one line; return False if it was the last one."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        complain(BadRequest(str(error).lower(), hint="close the quotation"), "usage", as_json=session.json)
        return True
    if not words:
        return True
    if words[0] in ("quit", "exit"):
        return False
    if words[0] == "help":
        words = [*words[1:2], "--help"]
    run(words, session)
    return True


# -- the line -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _line_editing(session: Session) -> Iterator[None]:
    """Give history and completion while the shell lasts."""
    history = history_file()
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(HISTORY_MAX)
    readline.set_completer_delims(" \t\n")
    readline.set_completer(Completer(session))
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        readline.set_completer(None)
        with contextlib.suppress(OSError):
            history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(history)
            history.chmod(0o600)


def history_file() -> Path:
    """Return where the lines are kept (https://specifications.freedesktop.org/basedir-spec/latest/)."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "hvsnap" / "history"


class Completer:
    """Completes what is typed at the prompt, by the same means as in bash: typer knows the grammar.

    :func:`hvsnap.cli.words` asks the daemon for names.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._found: list[str] = []

    def __call__(self, _text: str, state: int) -> str | None:
        """Return the ``state``-th completion of the word at the cursor, None after the last (readline's way)."""
        if state == 0:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            try:
                self._found = self.complete(line)
            except Exception:
                self._found = []  # readline would swallow it, too; the prompt goes on
        return self._found[state] if state < len(self._found) else None

    def complete(self, line: str) -> list[str]:
        """Return the words that the last word of ``line`` may become."""
        first, gap, rest = line.lstrip().partition(" ")
        if not gap:
            return [f"{word} " for word in sorted({*grammar.names(), *OWN}) if word.startswith(first)]
        if first in OWN:
            return [f"{word} " for word in grammar.names() if first == "help" and word.startswith(rest)]
        return [f"{word} " for word in self._ask_typer(line)]

    def _ask_typer(self, line: str) -> list[str]:
        """Return typer's answer, asked for as the fish shell does: a word a line, then a tab and its help."""
        asked = {
            "_HVSNAP_COMPLETE": "complete_fish",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "_TYPER_COMPLETE_ARGS": f"hvsnap {line}",
        }
        out = io.StringIO()
        os.environ.update(asked)
        try:
            with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
                grammar.root().main([], prog_name="hvsnap", obj=self._session)
        finally:
            for name in asked:
                os.environ.pop(name, None)
        return [word.partition("\t")[0] for word in out.getvalue().splitlines() if word]
