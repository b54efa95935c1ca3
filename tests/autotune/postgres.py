"""A PostgreSQL server of the tests' own, on a free port of loopback."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))


def pg_ctl() -> Path | None:
    """Where the server's control program is, if it is installed."""
    found = shutil.which("pg_ctl")
    return Path(found) if found else (DEBIAN[-1] if DEBIAN else None)


@dataclass(frozen=True)
class Server:
    """A running server."""

    control: Path
    folder: Path
    port: int

    @property
    def url(self) -> str:
        return f"postgresql://tester:secret@127.0.0.1:{self.port}/postgres"

    def run(self, *command: str) -> None:
        """As a user that the server may run as, which root is not."""
        as_other = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        with tempfile.TemporaryFile("w+") as said:
            made = subprocess.run(
                command, cwd="/", stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False, **as_other
            )
            said.seek(0)
            assert made.returncode == 0, said.read()

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        log = str(self.folder / "log")
        self.run(str(self.control), "-D", str(self.folder / "data"), "-l", log, "-o", options, "-w", "start")

    def stop(self) -> None:
        """At once: connections are cut."""
        self.run(str(self.control), "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")


@contextmanager
def server() -> Iterator[Server]:
    """Made, started, and taken away again."""
    control = pg_ctl()
    assert control is not None, "PostgreSQL's server is not installed: apt-get install postgresql"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="attncc-postgres-") as folder:
        made = Server(control, Path(folder), port)
        (made.folder / "password").write_text("secret")
        if os.getuid() == 0:
            owner = pwd.getpwnam("postgres")
            for path in (made.folder, made.folder / "password"):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        made.run(
            str(control.with_name("initdb")), "-D", str(made.folder / "data"), "-U", "tester", "-A", "scram-sha-256",
            "--pwfile", str(made.folder / "password"), "--no-sync",
        )  # fmt: skip
        made.start()
        try:
            yield made
        finally:
            made.stop()
