"""Requests to OTLP/JSON files, as the File Exporter specification has them: one signal a file, one request a line."""

import errno
import os
from datetime import UTC, datetime
from pathlib import Path

from tcpio_otel.errors import EnvironmentFault
from tcpio_otel.export.transport import Accepted, Refused, Reply
from tcpio_otel.payload import Request, Signal


class FileTransport:
    """Appends to `<signal>.jsonl` in a directory, and rotates it by size.

    A full file is renamed to `<signal>-<UTC time>.jsonl`; of those, `keep` are kept, so that a signal never takes more
    than about `rotate_bytes * (keep + 1)`.

    Raises:
        EnvironmentFault: on construction, when the directory or the file cannot be made or written.
    """

    def __init__(self, signal: Signal, directory: Path, *, rotate_bytes: int, keep: int) -> None:
        self._signal, self._directory = signal, directory
        self._rotate_bytes, self._keep = rotate_bytes, keep
        self._path = directory / f"{signal.value}.jsonl"
        self.destination = str(self._path)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise EnvironmentFault(
                f"cannot write {self._path}: {error.strerror}; choose a directory that uid {os.getuid()} owns"
            ) from None

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._size = os.fstat(self._file).st_size

    def send(self, request: Request) -> Reply:
        """Append one line; what could not be written whole is taken back."""
        try:
            if self._size and self._size + len(request.body) > self._rotate_bytes:
                self._rotate()
            written = 0
            while written < len(request.body):
                written += os.write(self._file, request.body[written:])
        except OSError as error:
            os.ftruncate(self._file, self._size)
            reason = "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "write_failed"
            return Refused(reason, f"cannot write: {error.strerror}")
        self._size += len(request.body)
        return Accepted()

    def _rotate(self) -> None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        os.rename(self._path, self._directory / f"{self._signal.value}-{stamp}.jsonl")
        os.close(self._file)
        self._open()
        rotated = sorted(self._directory.glob(f"{self._signal.value}-*.jsonl"))
        for old in rotated[: max(0, len(rotated) - self._keep)]:
            old.unlink()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
