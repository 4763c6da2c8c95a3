"""The bench of large data in small: it runs, its memory stays, and several ranks go on with the unbroken stream's batches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "bench" / "data_stream.py"


def test_large_data_streams_and_resumes(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--records", "5000", "--encode", "600", "--format", "json"]
    done = subprocess.run(
        [*command, "--ranks", "2", "--dir", str(tmp_path)], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["json"]
    assert found["index"]["records"] == 5000
    assert (found["resume"]["equal"], found["resume"]["ranks"]) == (True, [1, 2])
    assert found["encode and pack"]["rows"] > 20
    assert found["encode and pack"]["fill"] > 0.8
    for what in ("read an epoch", "encode and pack"):
        memory = found[what]["rss_mb"]
        assert memory["100%"] < memory["10%"] + 60, what
        assert found[what]["peak_mb"] < 1500, what
    assert not list(tmp_path.iterdir())
