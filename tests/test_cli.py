"""The console script as it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(sys.executable).with_name("nfd")


@pytest.mark.skipif(not SCRIPT.exists(), reason="the package is not installed")
def test_policies_are_found_in_the_folder_that_it_is_started_in(tmp_path: Path) -> None:
    (tmp_path / "my_policies.py").write_text("class Mine: ...\n")
    command = [str(SCRIPT), "eval-agent", "my_policies:Absent", "--real-only"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    # The module has been imported: only the class is missing.
    assert result.returncode == 1
    assert "module 'my_policies' has no attribute 'Absent'" in result.stderr
