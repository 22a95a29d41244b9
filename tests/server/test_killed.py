"""A real server that is killed while batches and runs are in progress, and started again.

Oracle: what was acknowledged before the kill.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from openai import OpenAI
from waiting import until

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")

LINES = 48


@contextlib.contextmanager
def served(port, store):
    """A server on ``port``; killed without notice at the end of the block."""
    command = [sys.executable, "-m", "oxillama_torch.cli", "serve", "--device", "cpu"]
    command += ["--port", str(port), "--store", str(store)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            until(lambda: answers(port), "the server does not start")
            with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x") as sdk:
                yield sdk
        finally:
            # The master alone would leave its worker behind.
            signal_group(process)


def signal_group(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def answers(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
            return True
    except OSError:
        return False


def output_of(sdk, batch_id):
    """Id of each line of output there is so far, by custom id."""
    text = sdk.get(f"/batch_jobs/{batch_id}/output", cast_to=str)
    return {line["custom_id"]: line["id"] for line in map(json.loads, text.splitlines())}


def line_of(model, index):
    body = {"model": model, "prompt": f"# {index}\nimport ", "max_tokens": 60, "ignore_eos": True}
    return {"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions", "body": body}


def test_batches_go_on_and_runs_have_failed(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with served(port, tmp_path / "store.db") as sdk:
        model = sdk.models.list().data[0].id
        assistant = sdk.beta.assistants.create(model=model, instructions="x")
        lines = "\n".join(json.dumps(line_of(model, i)) for i in range(LINES))
        file = sdk.files.create(file=("in.jsonl", lines.encode()), purpose="batch")
        batch = sdk.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        until(
            lambda: sdk.batches.retrieve(batch.id).request_counts.completed >= 5,
            "no line of the batch is run",
        )
        run = sdk.beta.threads.create_and_run(
            assistant_id=assistant.id, thread={"messages": [{"role": "user", "content": "hi"}]}
        )
        done = output_of(sdk, batch.id)
    assert 5 <= len(done) < LINES
    with served(port, tmp_path / "store.db") as sdk:
        after = sdk.beta.threads.runs.retrieve(run.id, thread_id=run.thread_id)
        assert after.status in ("failed", "completed")
        until(
            lambda: sdk.batches.retrieve(batch.id).status == "completed",
            "the batch does not end",
        )
        ended = sdk.batches.retrieve(batch.id)
        assert ended.request_counts.completed == LINES
        found = output_of(sdk, batch.id)
        assert len(found) == LINES
        assert {name: found[name] for name in done} == done
