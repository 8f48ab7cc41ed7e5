"""Writes that fail: a full disk, a size limit, a read-only place; what a store does then, tried in a child process."""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

from tests.crash.aftermath import assert_clean, difference
from tests.crash.forks import Say
from tests.crash.operations import OPERATIONS, State, read_state, see, small_steps, states_of
from tests.store.small import open_small

from longmem.errors import LongMemError, StoreFull


class Shortage(Protocol):
    """Something that makes writes fail while it lasts."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    @property
    def felt(self) -> bool:
        """Whether it made anything fail; True where that cannot be told."""
        ...


NEEDS_ROOM = {"create", "write", "mkdir", "replace"}


class FailingCalls:
    """One call of the file system fails, or that and all later ones that need room.

    Only calls below ``folder`` count, and only those of Python: SQLite's own are met by the other shortages.
    """

    def __init__(self, folder: Path, nth: int, code: str, lasting: bool) -> None:
        self._folder = str(folder)
        self._nth, self._error, self._lasting = nth, getattr(errno, code), lasting
        self._stack = ExitStack()
        self.calls = 0
        self.felt = False

    def begin(self) -> None:
        self._real_open = io.open
        for name, kind in (("mkdir", "mkdir"), ("replace", "replace"), ("unlink", "unlink")):
            self._patch(os, name, kind, path_of=lambda arguments: str(arguments[0]))
        for name, kind in (("fsync", "fsync"), ("pwrite", "write")):
            self._patch(os, name, kind, path_of=lambda arguments: os.readlink(f"/proc/self/fd/{arguments[0]}"))
        self._patch(os, "open", "create", path_of=lambda at: str(at[0]) if at[1] & os.O_CREAT else "")
        self._stack.enter_context(patch.object(io, "open", self._open))

    def end(self) -> None:
        self._stack.close()

    def _patch(self, module: Any, name: str, kind: str, path_of: Callable[[tuple[Any, ...]], str]) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            self.reached(kind, path_of(arguments))
            return real(*arguments, **settings)

        self._stack.enter_context(patch.object(module, name, call))

    def _open(self, path: Any, mode: str = "r", *more: Any, **settings: Any) -> Any:
        if "w" not in mode:
            return self._real_open(path, mode, *more, **settings)
        self.reached("create", str(path))
        return io.BufferedWriter(_FailingFile(str(path), self))

    def reached(self, kind: str, path: str) -> None:
        if not path.startswith(self._folder):
            return
        self.calls += 1
        again = self._lasting and self.calls > self._nth and kind in NEEDS_ROOM
        if self.calls == self._nth or again:
            self.felt = True
            raise OSError(self._error, os.strerror(self._error))


class _FailingFile(io.FileIO):
    def __init__(self, path: str, calls: FailingCalls) -> None:
        super().__init__(path, "wb")
        self._calls = calls

    def write(self, data: Any) -> int:
        self._calls.reached("write", os.fsdecode(self.name))  # type: ignore[arg-type]
        return super().write(data) or 0


class SizeLimit:
    """No file may grow beyond so many bytes (RLIMIT_FSIZE)."""

    felt = True

    def __init__(self, bytes: int) -> None:
        self._bytes = bytes

    def begin(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._bytes, self._before[1]))

    def end(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


class FullDisk:
    """So many bytes are free on the file system of ``folder``, which is small."""

    felt = True

    def __init__(self, folder: Path, free: int) -> None:
        self._ballast = folder / "ballast"
        self._free = free

    def begin(self) -> None:
        with self._ballast.open("wb", buffering=0) as stream:
            with suppress(OSError):
                while True:
                    stream.write(bytes(4096))
            stream.truncate(max(0, stream.tell() - self._free))

    def end(self) -> None:
        self._ballast.unlink()


def small_disk(folder: Path, bytes: int) -> bool:
    """Put a file system of this size at a folder, for this process alone; False where the system does not allow it."""
    system = ctypes.CDLL(None, use_errno=True)
    new_users, new_mounts = 0x10000000, 0x00020000
    user = os.getuid()
    if system.unshare(new_mounts if user == 0 else new_users | new_mounts):
        return False
    with suppress(OSError):
        if user:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {os.getgid()} 1")
        recursive_private = 0x4000 | 0x40000
        system.mount(b"none", b"/", None, recursive_private, None)
        return not system.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={bytes}".encode())
    return False


def one_shortage(path: Path, operation: str, states: list[State], shortage: Shortage) -> tuple[str, str] | None:
    """Do an operation while a shortage lasts, look, end the shortage, and do it again; the error, if there was one."""
    chosen = OPERATIONS[operation]
    promises: list[Any] = []
    error: LongMemError | None = None
    store = None
    shortage.begin()
    try:
        store = chosen.open(path)
        try:
            chosen.act(store, promises.append)
        except LongMemError as caught:
            error = caught
            # the same process sees the state as before, and goes on once there is room; a file may be healed though
            # its disk then fails to say that it will stay so
            healed = operation.startswith("repair") and see(store) == states[-1]
            expect(see(store), states, len(states) - 1 if healed else len(promises), error)
            shortage.end()
            expect(see(store), states, len(states) - 1 if healed else len(promises), error)
            chosen.act(store, lambda _: None)
            expect(see(store), states, len(states) - 1, error)
        store.close()
    except LongMemError as caught:
        if store is not None:
            raise
        error = caught
    finally:
        with suppress(FileNotFoundError):
            shortage.end()
    if store is None:  # it could not even be opened; a new one may have been made, and is empty
        made = operation == "create" and read_state(path) == states[-1]
        expect(read_state(path), states, len(states) - 1 if made else 0, error)
        chosen.run(path, lambda _: None)
    expect(read_state(path), states, len(states) - 1, error)
    with open_small(path) as again:
        assert_clean(again.verify())
    return None if error is None else (type(error).__name__, str(error))


def expect(found: State, states: list[State], number: int, error: Exception | None) -> None:
    """The store is in this state."""
    assert found == states[number], f"{difference(found, states[number])}; after {error!r}"


def prepared(operation: str, scratch: Path) -> tuple[list[State], Callable[[], Iterator[Path]]]:
    """The states of an operation, and copies of what is there before it, each at an own place that is cleared away."""
    logging.disable()  # that a store is left without a seal is no news here
    (scratch / "states").mkdir()
    states = states_of(OPERATIONS[operation], scratch / "states" / "store")
    shutil.rmtree(scratch / "states")
    (scratch / "before").mkdir()
    OPERATIONS[operation].prepare(scratch / "before" / "store")

    def copies() -> Iterator[Path]:
        while True:
            shutil.copytree(scratch / "before", scratch / "trial")
            yield scratch / "trial" / "store"
            shutil.rmtree(scratch / "trial")

    return states, copies


def failing_calls(
    say: Say, operation: str, scratch: str, code: str, lasting: bool, begin: int = 1, step: int = 1
) -> None:
    """Let every ``step``-th call of the file system fail; says error and number of every trial."""
    states, copies = prepared(operation, Path(scratch))
    with small_steps(), OPERATIONS[operation].settings():
        for nth, path in zip(range(begin, 10_000, step), copies(), strict=False):
            say(["begin", nth])
            shortage = FailingCalls(path.parent, nth, code, lasting)
            error = one_shortage(path, operation, states, shortage)
            if not shortage.felt:
                assert error is None
                say(["calls", shortage.calls])
                return
            say(["error", error])


def limited(say: Say, operation: str, scratch: str, limits: list[int]) -> None:
    """Try file size limits; says the error of every trial."""
    states, copies = prepared(operation, Path(scratch))
    with small_steps(), OPERATIONS[operation].settings():
        for limit, path in zip(limits, copies(), strict=False):
            say(["begin", limit])
            say(["error", one_shortage(path, operation, states, SizeLimit(limit))])


def on_small_disk(say: Say, operation: str, scratch: str, bytes: int, free: list[int]) -> None:
    """Try a disk with so much room left; says the error of every trial, or ``no disk``."""
    if not small_disk(Path(scratch), bytes):
        say("no disk")
        return
    states, copies = prepared(operation, Path(scratch))
    with small_steps(), OPERATIONS[operation].settings():
        for left, path in zip(free, copies(), strict=False):
            say(["begin", left])
            say(["error", one_shortage(path, operation, states, FullDisk(Path(scratch), left))])


def read_only_folder(say: Say, scratch: str, what: list[str], during: bool) -> None:
    """Open, and add to, a store parts of which this process may not write to; says what happened.

    Args:
        what: the parts, relative to the store.
        during: the rights are taken away behind the open store.
    """
    states, copies = prepared("add", Path(scratch))
    for place in [Path(scratch), *Path(scratch).rglob("*")]:
        os.chmod(place, 0o777 if place.is_dir() else 0o666)
    path = next(copies())
    if os.getuid() == 0:  # root may write everywhere
        for place in [path.parent, path, *path.rglob("*")]:
            os.chown(place, 65534, 65534)
        os.setgid(65534)
        os.setuid(65534)
    rights = {path / part: (path / part).stat().st_mode & 0o777 for part in what}

    def take(away: bool) -> None:
        for place, mode in rights.items():
            os.chmod(place, mode & 0o555 if away else mode)
        for beside in path.glob("catalog.sqlite-*"):  # SQLite gives them the rights of the catalog
            os.chmod(beside, 0o666)

    with small_steps():
        try:
            if not during:
                take(True)
            store = open_small(path)
            take(True)
            try:
                OPERATIONS["add"].act(store, lambda _: None)
                say(["error", None])
            except StoreFull as error:
                say(["error", [type(error).__name__, str(error)]])
                expect(see(store), states, 0, error)
                take(False)
                OPERATIONS["add"].act(store, lambda _: None)
            store.close()
        except StoreFull as error:
            say(["not opened", [type(error).__name__, str(error)]])
            expect(read_state(path), states, 0, error)
            take(False)
            OPERATIONS["add"].run(path, lambda _: None)
        take(True)
        expect(read_state(path), states, 1, None)  # it can always be read
        take(False)
        with open_small(path) as store:
            assert_clean(store.verify())


def read_only_disk(say: Say, scratch: str, killed: bool) -> None:
    """Read a store, closed or left by a killed writer, on a file system that nothing can be written to."""
    if not small_disk(Path(scratch), 4 << 20):
        say("no disk")
        return
    path = Path(scratch) / "store"
    OPERATIONS["add"].prepare(path)
    expected = read_state(path)
    if killed and os.fork() == 0:
        open_small(path).forget("bob", name="ids")
        os._exit(0)
    if killed:
        os.wait()
        expected["bob"] = [each for each in expected["bob"] if each["name"] != "ids"]
    remount_read_only = 0x20 | 0x1
    system = ctypes.CDLL(None, use_errno=True)
    assert system.mount(b"none", os.fsencode(scratch), None, remount_read_only, None) == 0
    assert read_state(path) == expected
    with open_small(path, mode="read", model=None) as store:
        say([problem.kind for problem in store.verify().problems])
    try:
        open_small(path)
        say("opened")
    except LongMemError as error:
        say([type(error).__name__, str(error)])
