"""The openai SDK over an app, without a socket."""

import importlib

import openai

# Older versions of the SDK take clients of httpx, newer ones of httpx2.
_client = next(c for c in openai.DefaultHttpxClient.__mro__ if c.__name__ == "Client")
_http = importlib.import_module(_client.__module__.partition(".")[0])


def sdk_over(app):
    """A client of the SDK; to be closed."""
    return openai.OpenAI(
        api_key="x",
        base_url="http://test/v1",
        http_client=_http.Client(transport=_http.WSGITransport(app=app.wsgi_app)),
        max_retries=0,
    )
