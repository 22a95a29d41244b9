"""A real server that is killed in the middle of everything, again and again.

Oracle: what it has acknowledged to its clients. After every start all of that is there, runs that
were cut have ended, and in the end every batch and background response has.
"""

import pytest
from fault_clients import Api, Ledger, wait_for_ends, write_until
from killed_again import Server
from waiting import PATIENCE_S

WAYS = ("worker", "all", "worker", "master")


def check(server, ledger, since):
    """What was acknowledged after ``since`` entries is there; runs end.

    A new worker may have begun one: clients wait in the queue that the master keeps open.
    """
    api = Api(server.url)
    assert not ledger.wrong(api, list(ledger.allowed)[since:])
    wait_for_ends(api, ledger, "/runs/")


def check_all(server, ledger):
    """Everything of all rounds, once what was cut has been finished."""
    api = Api(server.url)
    wait_for_ends(api, ledger, timeout_s=5 * PATIENCE_S)
    assert not ledger.wrong(api)


def run_rounds(settings, kills, folder):
    ledger = Ledger()
    with open(folder / "server.log", "wb") as log:
        server = Server(settings, log)
        try:
            server.start()
            for number in range(kills):
                way, since = WAYS[number % len(WAYS)], len(ledger.allowed)
                write_until(Api(server.url), ledger, lambda way=way: server.kill(way))
                server.restart(way)
                check(server, ledger, since)
                print(f"kill {number + 1} ({way}): {ledger.total} acknowledged", flush=True)
            check_all(server, ledger)
        finally:
            server.stop()
    print(f"{kills} kills, {ledger.total} acknowledged: {dict(ledger.counts)}")
    assert not list(folder.glob("**/*.part"))


def test_nothing_acknowledged_is_lost_by_two_kills(new_store, tmp_path):
    run_rounds(new_store("sqlite"), 2, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_nothing_acknowledged_is_lost_by_fifty_kills(store_settings, tmp_path):
    run_rounds(store_settings, 50, tmp_path)
