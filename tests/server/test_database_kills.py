"""A real server that lives on while its PostgreSQL is killed.

Oracle: what the server has acknowledged to its clients. While the database is away it says so with
503; once it is back all of that is there, everything begun comes to its end, and the server is the
same process.
"""

import json
import random
import time
import urllib.request

import psutil
import pytest
from fault_clients import Api, Gone, Ledger, wait_for_ends, write_until
from killed_again import Server
from private_postgres import PrivatePostgres, missing
from waiting import PATIENCE_S, until

WAYS = ("postmaster", "backend", "all", "postmaster")


@pytest.fixture
def own_postgres():
    """One that nobody else uses: it will be killed."""
    if reason := missing():
        pytest.skip(reason)
    postgres = PrivatePostgres()
    yield postgres
    postgres.close()


def refused(api):
    """Whether a write is refused as it is while the database is away; anything but that fails."""
    try:
        api.post("/v1/conversations", metadata={})
    except Gone as gone:
        [body] = gone.args
        assert json.loads(body)["error"]["code"] == "store_unavailable", body
        return True
    return False


def kill_and_restart(postgres, api, way):
    postgres.kill(way)
    if way != "backend":  # after one backend PostgreSQL starts itself again
        until(lambda: refused(api), "the database is still there")
        with urllib.request.urlopen(f"{api.url}/health", timeout=PATIENCE_S) as answer:
            assert answer.status == 200
        time.sleep(random.uniform(0, 8))  # also longer than a write waits for the database
        until(postgres.starts, "PostgreSQL does not start again")
    until(lambda: not refused(api), "the server does not come back to its database")


def run_rounds(postgres, kills, folder):
    ledger = Ledger()
    settings = {"store": postgres.database(), "blobs": folder / "blobs"}
    with open(folder / "server.log", "wb") as log:
        server = Server(settings, log)
        try:
            server.start()
            api, process = Api(server.url), psutil.Process(server.process.pid)
            workers = process.children()
            for number in range(kills):
                way, since = WAYS[number % len(WAYS)], len(ledger.allowed)
                write_until(api, ledger, lambda way=way: kill_and_restart(postgres, api, way))
                assert not ledger.wrong(api, list(ledger.allowed)[since:])
                wait_for_ends(api, ledger, "/runs/")
                print(f"kill {number + 1} ({way}): {ledger.total} acknowledged", flush=True)
            wait_for_ends(api, ledger, timeout_s=5 * PATIENCE_S)
            assert not ledger.wrong(api)
            assert process.children() == workers
        finally:
            server.stop()
    assert b"Traceback" not in (folder / "server.log").read_bytes()
    print(f"{kills} kills, {ledger.total} acknowledged: {dict(ledger.counts)}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [4, 20])
def test_nothing_acknowledged_is_lost_by_kills_of_the_database(own_postgres, tmp_path, kills):
    run_rounds(own_postgres, kills, tmp_path)
