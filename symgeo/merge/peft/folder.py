"""An output folder that appears whole or not at all.

Everything is written into a hidden sibling, which takes the place of the folder by one rename.  A folder that is
replaced is first moved aside, and removed last.  The siblings are named after the process, so that the next run
can tell what a killed one has left behind.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from symgeo.merge.peft.signals import terminable

Say = Callable[[str], None]
OVERTAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT)  # what a rename says after another one


def check_target(out: str | Path, inputs: Sequence[Path], overwrite: bool) -> Path:
    """The real path of an output folder that may be written.

    Raises ``ValueError`` where it is a file or cannot be made, lies in an input folder or holds one, or is not empty
    without ``overwrite``.
    """
    if not str(out):
        raise ValueError("out: needed the name of a folder; got an empty one")
    path = Path(os.path.realpath(out))
    if path.exists() and not path.is_dir():
        raise ValueError(f"{out}: the output is a file; name a folder that does not exist yet")
    nearest = next(parent for parent in path.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "is not writable" if nearest.is_dir() else "is a file"
        raise ValueError(f"{out}: nothing can be made there, {nearest} {what}; choose another folder")
    for folder in map(Path, map(os.path.realpath, inputs)):
        if path == folder or path in folder.parents or folder in path.parents:
            raise ValueError(f"{out}: the output may not be, hold or lie in the input {folder}; choose another folder")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{out}: the output folder is not empty; name another one, or overwrite it (--overwrite)")
    return path


@contextmanager
def new_folder(out: str | Path, inputs: Sequence[Path], overwrite: bool, say: Say) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` if the block succeeds, and is removed if it does not.

    Parents are made, and removed again after a failure.  Raises ``ValueError`` as :func:`check_target` does, and
    where another process has written ``out`` meanwhile.
    """
    path = check_target(out, inputs, overwrite=True)
    tidy(path, say)
    path = check_target(out, inputs, overwrite)
    before = _identity(path)
    temporary, made = _sibling(path, "new"), []
    with terminable():
        try:
            try:
                for parent in [p for p in path.parents if not p.exists()][::-1]:
                    parent.mkdir(exist_ok=True)
                    made.append(parent)
                temporary.mkdir()
            except OSError as error:
                reason = (error.strerror or "error").lower()
                raise ValueError(f"{path}: cannot be made there ({reason}); choose another path") from error
            yield temporary
            _flush(temporary)
            _take_place(temporary, path, before)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in reversed(made):
                with suppress(OSError):
                    parent.rmdir()
            raise


def tidy(path: Path, say: Say) -> None:
    """Remove what dead processes left beside ``path``; a folder that one had moved aside is put back."""
    prefix = f".{_short(path)}-{_host()}-"
    if not path.parent.is_dir():
        return
    for left in sorted(path.parent.iterdir()):
        if not left.name.startswith(prefix):
            continue
        match = re.fullmatch(r"(\d+)-[0-9a-f]+\.(new|old)", left.name.removeprefix(prefix))
        if match is None or _alive(int(match[1])):
            continue
        if match[2] == "old" and not path.exists():
            os.rename(left, path)
            say(f"{path}: put back as it was before a merge that was killed")
        else:
            shutil.rmtree(left, ignore_errors=True)
            say(f"{left}: removed, left by a merge that was killed")


def _take_place(temporary: Path, path: Path, before: object) -> None:
    """Rename into place; a folder that stands there, and is the one seen at the start, is moved aside first."""
    aside = _sibling(path, "old")
    try:
        if (found := _identity(path)) is not None:
            if found != before:
                raise _overtaken(path)
            os.rename(path, aside)
            if _identity(aside) != before:
                raise _overtaken(path)
        if os.name == "nt" and path.is_dir():
            path.rmdir()
        os.rename(temporary, path)  # onto an empty folder too; one that is not empty makes it fail
    except BaseException as error:
        with suppress(OSError):
            os.rename(aside, path)
        if isinstance(error, OSError) and error.errno in OVERTAKEN:
            raise _overtaken(path) from error
        raise
    finally:
        if path.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
    _flush_folder(path.parent)


def _overtaken(path: Path) -> ValueError:
    return ValueError(f"{path}: another process has written this folder meanwhile; its result was kept, this one not")


def _identity(path: Path) -> object:
    """What tells a folder with contents from another one of its name; None for none, or an empty one."""
    if not (path.is_dir() and any(path.iterdir())):
        return None
    status = path.stat()
    return status.st_dev, status.st_ino


def _sibling(path: Path, kind: str) -> Path:
    return path.parent / f".{_short(path)}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}.{kind}"


def _short(path: Path) -> str:
    """The name of the output, in full if it is short, and in any case unmistakable."""
    return f"{path.name[:60]}-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}"


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _alive(process: int) -> bool:
    if os.name == "nt":  # signal 0 would end the process there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _flush(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
