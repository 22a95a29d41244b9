"""kill -9 while writing. Oracle: the acknowledgements that left the process before it died."""

import random
import signal
import subprocess
import sys
import time

import pytest

from oxillama_torch.config import ServerConfig
from oxillama_torch.server.store.paging import page
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables import ConversationRow

WRITER = """
import io, os, sys, threading
from pathlib import Path
from oxillama_torch.config import ServerConfig
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables import ConversationRow

store = Store(ServerConfig(store=sys.argv[1], blobs=Path(sys.argv[2])))

def work(thread):
    for n in range(1_000_000):
        name = f"{os.getpid()}-{thread}-{n}"
        data = {"name": name, "text": name * 20}
        if n % 8 == 0:
            data["blob"], _ = store.blobs.put(io.BytesIO(name.encode()))
        store.write(lambda session: session.add(ConversationRow(id=name, data=data)))
        os.write(1, f"{name}\\n".encode())

for n in range(4):
    threading.Thread(target=work, args=(n,)).start()
"""


def run_and_kill(url, blobs):
    """The names that a writer acknowledged before it was killed."""
    command = [sys.executable, "-c", WRITER, url, str(blobs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        first = process.stdout.readline()
        time.sleep(random.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        return (first + process.stdout.read()).decode().splitlines()


@pytest.mark.parametrize(
    "kills", [pytest.param(2, id="few"), pytest.param(50, id="many", marks=pytest.mark.slow)]
)
def test_every_acknowledged_record_survives(store_settings, tmp_path, kills):
    url = store_settings["store"]
    blobs = store_settings.get("blobs", tmp_path / "blobs")
    acknowledged = []
    for _ in range(kills):
        acknowledged += run_and_kill(url, blobs)
    assert len(acknowledged) > kills
    store = Store(ServerConfig(store=url, blobs=blobs))
    with store.read() as session:
        rows, _ = page(session, ConversationRow, limit=10_000_000)
        found = {row.id: row.data for row in rows}
    for name in acknowledged:
        assert found[name]["text"] == name * 20
    for name, data in found.items():
        if "blob" in data:
            with store.blobs.open(data["blob"]) as file:
                assert file.read().decode() == name
    assert len({row.seq for row in rows}) == len(rows)
    assert not list(blobs.glob("*.part"))
    store.close()
