"""A PostgreSQL of one's own, from the system's packages: a folder, a socket in it, no port."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import psutil

__all__ = ["PrivatePostgres", "missing"]


def _program(name):
    """Debian keeps the server's programs off PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))


def missing():
    """Why there can be none here, or None."""
    if importlib.util.find_spec("psycopg") is None:
        return "needs psycopg"
    if not (_program("initdb") and _program("pg_ctl")):
        return "needs PostgreSQL's initdb and pg_ctl (Debian and Ubuntu: apt install postgresql)"
    if os.getuid() == 0 and _unprivileged() is None:
        return "PostgreSQL does not run as root, and there is no user postgres or nobody"
    return None


def _unprivileged():
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


class PrivatePostgres:
    """A running cluster; ``database()`` makes an empty database in it."""

    def __init__(self):
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self._user = _unprivileged() if os.getuid() == 0 else None
        if self._user:
            os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
        self._data = self._folder / "data"
        self._run("initdb", "-A", "trust", "-U", "tests", "--no-sync", "-D", self._data)
        self.start()

    def _run(self, name, *arguments):
        identity = {}
        if self._user:
            identity = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        subprocess.run(
            [_program(name), *map(str, arguments)], check=True, timeout=120, cwd=self._folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **identity,
        )  # fmt: skip

    def start(self):
        options = f"-c listen_addresses='' -c unix_socket_directories={self._folder} -c fsync=off"
        log = self._folder / "log"
        self._run("pg_ctl", "start", "-w", "-D", self._data, "-o", options, "-l", log)

    def stop(self, mode="immediate"):
        self._run("pg_ctl", "stop", "-w", "-m", mode, "-D", self._data)

    def kill(self, way):
        """kill -9 of the ``postmaster``, of one ``backend``, of ``all`` its processes."""
        postmaster = psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))
        children = postmaster.children()
        backends = [p for p in children if " tests " in " ".join(p.cmdline())]
        doomed = {"postmaster": [postmaster], "backend": backends[:1]}.get(way)
        for process in doomed or [postmaster, *children]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def starts(self):
        """Start again after a kill; False while processes are left over that hold its memory."""
        try:
            self.start()
        except subprocess.CalledProcessError:
            return False
        return True

    def url(self, database="postgres"):
        return f"postgresql://tests@/{database}?host={self._folder}"

    def database(self):
        """The URL of a new, empty database."""
        import psycopg

        name = f"d{uuid.uuid4().hex}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return self.url(name)

    def close(self):
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop()
        # Thousands of files per database: on a busy machine that takes minutes, so nobody waits.
        remove = ["sh", "-c", 'rm -rf "$1" >/dev/null 2>&1 &', "sh", str(self._folder)]
        subprocess.run(remove, check=True)
