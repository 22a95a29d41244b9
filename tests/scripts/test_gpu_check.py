"""scripts/gpu_check in miniature: every section that needs no GPU runs, and says what it found."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _run(tmp_path, *arguments):
    command = [sys.executable, ROOT / "scripts" / "gpu_check", "--device", "cpu", "--small"]
    done = subprocess.run(
        [*command, "--out", tmp_path, *arguments], capture_output=True, text=True, timeout=280
    )
    [path] = tmp_path.glob("*.json")
    return done, json.loads(path.read_text())


def test_sections_run_and_are_written_down(tmp_path):
    done, found = _run(tmp_path, "--only", "ceilings", "kernels", "host", "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    sections = found["sections"]
    assert sections["ceilings"]["copy"] > 0
    assert {row["type"] for row in sections["kernels"]["rows"]} == {"Q8_0", "Q4_K"}
    assert all(row["replays"] == row["copies"] == 1 for row in sections["host"]["rows"])
    assert all(row["decode_tok_s"] > 0 for row in sections["demo"]["rows"])
    [table] = tmp_path.glob("*.md")
    assert "| Q4_K | 16 |" in table.read_text()


def test_time_that_is_up_is_said(tmp_path):
    done, found = _run(tmp_path, "--only", "ceilings", "--minutes", "0")
    assert done.returncode == 0
    assert "spent already" in found["sections"]["ceilings"]["skipped"]
