"""Guessing keys and the admin token. Oracles: a set clock, and what is left for everybody else."""

import threading

import pytest

from oxillama_torch.errors import RequestError
from oxillama_torch.server.guesses import PER_MINUTE, Guesses, TooManyGuesses, WrongCredential

LONG = "k" * 20


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def wrong():
    raise WrongCredential("no", "invalid_api_key")


def judged(guesses, credential, *, right=False, address="192.0.2.1"):
    """``right``, ``wrong`` or ``later``: what whoever sends a credential is told."""
    try:
        guesses.judge(address, credential, (lambda: None) if right else wrong)
    except WrongCredential as error:
        assert error.status == 401
        return "wrong"
    except TooManyGuesses as error:
        assert error.status == 429 and error.retry_after_s > 0
        return "later"
    return "right"


@pytest.mark.parametrize("credential", ["short", LONG])
def test_an_address_has_a_number_of_guesses(credential):
    clock = Clock()
    guesses = Guesses(clock)
    answers = [judged(guesses, credential) for _ in range(2 * PER_MINUTE)]
    assert answers == ["wrong"] * PER_MINUTE + ["later"] * PER_MINUTE
    clock.now += 60 / PER_MINUTE + 0.01
    assert [judged(guesses, credential) for _ in range(2)] == ["wrong", "later"]
    assert judged(guesses, credential, address="192.0.2.2") == "wrong"


def test_only_what_nobody_can_guess_passes_while_somebody_guesses():
    """Behind the same address: a short key is not told apart from a wrong one."""
    clock = Clock()
    guesses = Guesses(clock)
    while judged(guesses, LONG) != "later":
        pass
    assert judged(guesses, LONG, right=True) == "right"
    assert judged(guesses, "short", right=True) == "later"
    clock.now += 60 / PER_MINUTE + 0.01
    # Right ones use nothing up.
    assert [judged(guesses, "short", right=True) for _ in range(100)] == ["right"] * 100


def test_other_refusals_and_no_credential_are_no_guesses():
    def forbidden():
        raise RequestError("no scope", status=403)

    guesses = Guesses(Clock())
    for _ in range(2 * PER_MINUTE):
        assert judged(guesses, "") == "wrong"
        for credential in ("short", LONG):
            with pytest.raises(RequestError, match="no scope"):
                guesses.judge("192.0.2.1", credential, forbidden)


def test_guesses_at_the_same_time_are_counted():
    guesses, answers = Guesses(Clock()), []

    def guess():
        answers.extend([judged(guesses, "short") for _ in range(20)])

    threads = [threading.Thread(target=guess) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers.count("wrong") == PER_MINUTE


@pytest.mark.parametrize(
    ("others", "same"),
    [("2001:db8::2", True), ("2001:db8::ffff:ffff:ffff:ffff", True), ("2001:db8:0:1::1", False),
     ("192.0.2.1", False)],
)  # fmt: skip
def test_a_network_of_ipv6_is_one_address(others, same):
    guesses = Guesses(Clock())
    while judged(guesses, LONG, address="2001:db8::1") != "later":
        pass
    assert judged(guesses, LONG, address=others) == ("later" if same else "wrong")


def test_an_ipv4_address_is_one_in_both_forms():
    guesses = Guesses(Clock())
    while judged(guesses, LONG, address="::ffff:192.0.2.1") != "later":
        pass
    assert judged(guesses, LONG) == "later"


@pytest.fixture
def app(make_app):
    return make_app(api_keys=(LONG, "key"), admin_token="a" * 32)


def status(app, path, token, **headers):
    headers = {"Authorization": f"Bearer {token}", **headers}
    return app.test_client().get(path, headers=headers)


@pytest.mark.parametrize(
    ("path", "right"), [("/v1/models", LONG), ("/admin/stats", "a" * 32)], ids=["key", "admin"]
)
def test_guesses_over_http(app, path, right):
    """Whatever the client says about itself; the holder of the right one notices nothing."""
    answers = []
    while not answers or answers[-1].status_code == 401:
        forwarded = f"198.51.100.{len(answers) % 250}"
        answers.append(status(app, path, f"guess{len(answers)}", **{"X-Forwarded-For": forwarded}))
        assert len(answers) < 1000
    refused = answers[-1]
    assert len(answers) > PER_MINUTE
    assert (refused.status_code, refused.get_json()["error"]["code"]) == (
        429, "too_many_wrong_credentials",
    )  # fmt: skip
    assert 1 <= int(refused.headers["Retry-After"]) <= 60 / PER_MINUTE
    assert status(app, path, right).status_code == 200
    assert status(app, "/health", "").status_code == 200


def test_old_keys_do_not_keep_the_administrator_out(make_app):
    app = make_app(api_keys=("key",), admin_token="admin")
    while status(app, "/v1/models", "old").status_code == 401:
        pass
    assert status(app, "/admin/stats", "admin").status_code == 200
