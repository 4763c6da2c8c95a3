"""Lines for which the disk has no room: none is lost, none is torn, and a person is told. /dev/full refuses every write."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from prism_nemo.experiment import Experiment, read_metrics
from prism_nemo.run_directory import append_json_lines, read_json_lines


def experiment(directory: Path) -> Experiment:
    return Experiment(
        directory,
        stage="sft",
        config_yaml="{}",
        resume=True,
        overwrite=False,
        is_main=True,
        tensorboard=False,
        nemo_exp_manager=None,
        progress=False,
    )


def test_lines_wait_until_there_is_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with experiment(tmp_path / "run") as run:
        metrics = tmp_path / "run" / "metrics.jsonl"
        metrics.symlink_to("/dev/full")
        for step in (1, 2, 3):
            run.log_metrics(step, {"loss": 1.0 / step})
        with pytest.raises(OSError, match="No space left"):
            run.flush()
        said = capsys.readouterr().err
        assert said.count("metrics.jsonl cannot be written") == 1, "once, not at every step"
        metrics.unlink()
        run.log_metrics(4, {"loss": 0.25})
        assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
        run.flush()
    notices = json.loads((tmp_path / "run" / "status.json").read_text())["notices"]
    assert "No space left on device" in notices[0]
    with experiment(tmp_path / "run"):
        pass
    assert json.loads((tmp_path / "run" / "status.json").read_text())["notices"] == notices, "kept when the run goes on"


def test_what_is_left_at_the_end_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with experiment(tmp_path / "run") as run:
        (tmp_path / "run" / "samples.jsonl").symlink_to("/dev/full")
        run.log_samples(1, [{"text": "a"}])
    assert "not everything could be written" in capsys.readouterr().err


def test_a_line_that_fits_in_part_is_taken_back(tmp_path: Path) -> None:
    """With a real limit: the system writes the first bytes and refuses the rest."""
    file = tmp_path / "rows.jsonl"
    append_json_lines(file, [{"row": 1}])
    limit = file.stat().st_size + 100
    script = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom prism_nemo.run_directory import append_json_lines\n"
        f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n    append_json_lines(Path(sys.argv[1]), [{'row': 2, 'text': 'x' * 1000}])\n"
        "except OSError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    append_json_lines(file, [{"row": 3}])
    assert list(read_json_lines(file)) == [{"row": 1}, {"row": 3}]
