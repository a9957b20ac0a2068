"""What the process is asked for."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from hvsnap.errors import Failed, HvsnapError, Refused
from hvsnap.guestfiles.session import GuestFiles, trouble
from hvsnap.guestfiles.unpack import CHUNK_BYTES, Tally, Traits, Tree, unpack

REPORT_S = 0.5

Tell = Callable[[dict[str, Any]], None]


class Requests:
    """Answers requests; ``tell`` sends messages before the answer, ``leftovers`` is what an interruption leaves."""

    def __init__(self, files: GuestFiles, tell: Tell, leftovers: list[Path]) -> None:
        self._files = files
        self._tell = tell
        self._leftovers = leftovers
        self._reported_at = 0.0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked, and return the answer. Raises errors of ours, and those of libguestfs."""
        kind = request.pop("do")
        if kind == "filesystems":
            return {"filesystems": self._files.filesystems()}
        device = self._files.open(request.pop("filesystem"))
        works: dict[str, Callable[..., dict[str, Any]]] = {"list": self._list, "copy": self._copy, "print": self._print}
        work = works[kind]
        return {"filesystem": device, **work(**request)}

    def _list(self, path: str, recursive: bool) -> dict[str, Any]:
        for entries in self._files.listing(path, recursive=recursive):
            self._tell({"entries": entries})
        return {}

    def _copy(self, into: str, sources: list[tuple[str, str]]) -> dict[str, Any]:
        """Copy each path to a name in the directory ``into``, which is ours alone until it is done."""
        self._leftovers.append(Path(into))
        tree = Tree(into, self._report)
        try:
            for path, name in sources:
                self._copy_one(tree, path, name)
        finally:
            tree.close()
        self._leftovers.remove(Path(into))
        return {"tally": vars(tree.tally)}

    def _copy_one(self, tree: Tree, path: str, name: str) -> None:
        if path.endswith("/"):  # a symbolic link is meant to be followed
            path = self._files.real(path)
        kind = self._files.kind(path)
        if kind == "directory":
            with self._streamed(path, lambda to: self._files.guest.tar_out(path, to, numericowner=True)) as stream:
                unpack(stream, tree, [name], path)
            return
        found = self._files.guest.lstatns(path)
        modified_ns = found["st_mtime_sec"] * 1_000_000_000 + found["st_mtime_nsec"]
        traits = Traits(found["st_mode"] & 0o7777, found["st_uid"], found["st_gid"], modified_ns)
        if kind == "file":
            with self._streamed(path, lambda to: self._files.guest.download(path, to)) as stream:
                tree.file([name], traits, stream)
        elif kind == "symlink":
            tree.symlink([name], self._files.guest.readlink(path), traits)
        else:
            raise Refused(f"{path} is a {kind}, which is not copied", hint="files, directories and symbolic links are")

    def _print(self, path: str, descriptor: int, archive: bool) -> dict[str, Any]:
        """Write a file's content, or a directory as a tar stream, to an open descriptor."""
        path = self._files.real(path)
        kind = self._files.kind(path)
        if kind == "directory" and not archive:
            hint = "redirect the output, or name a directory to copy it to"
            raise Refused(f"{path} is a directory: a tar stream is not written to a terminal", hint=hint)
        if kind not in ("file", "directory"):
            raise Refused(f"{path} is a {kind}, which has no content", hint="`hvsnap snapshot-ls` shows what there is")
        guest = self._files.guest
        get = guest.download if kind == "file" else lambda path, to: guest.tar_out(path, to, numericowner=True)
        tally = Tally(files=int(kind == "file"))
        with self._streamed(path, lambda to: get(path, to)) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                _write_all(descriptor, chunk)
                tally.copied_bytes += len(chunk)
                self._report(tally)
        return {"tally": vars(tally)}

    @contextlib.contextmanager
    def _streamed(self, path: str, get: Callable[[str], object]) -> Iterator[IO[bytes]]:
        """Give what libguestfs writes (``get``, to a file of a name) as a stream. Its failure is the block's."""
        reading, writing = os.pipe()
        failed: list[RuntimeError] = []

        def work() -> None:
            try:
                get(f"/dev/fd/{writing}")
            except RuntimeError as error:
                failed.append(error)
            finally:
                os.close(writing)

        thread = threading.Thread(target=work, name="libguestfs")
        thread.start()
        try:
            with os.fdopen(reading, "rb", buffering=CHUNK_BYTES) as stream:
                yield stream
        except HvsnapError as error:
            thread.join()
            # What we found wrong may only be what its own failure has left of the stream.
            if failed and "Broken pipe" not in str(failed[0]):
                raise trouble(path, failed[0]) from error
            raise
        finally:
            thread.join()
        if failed:
            raise trouble(path, failed[0]) from failed[0]

    def _report(self, tally: Tally) -> None:
        now = time.monotonic()
        if now - self._reported_at >= REPORT_S:
            self._reported_at = now
            self._tell({"progress": {"files": tally.files, "bytes": tally.copied_bytes}})


def _write_all(descriptor: int, data: bytes) -> None:
    piece = memoryview(data)
    try:
        while piece:
            piece = piece[os.write(descriptor, piece) :]
    except OSError as error:
        raise Failed(f"the output cannot be written: {error.strerror}", hint="see where it goes") from error
