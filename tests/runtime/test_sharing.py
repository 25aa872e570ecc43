"""Whether threads that wait spin, by what else runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ASK = "from vicreg_hf.runtime.sharing import share_cores; import os; share_cores(); "
SPIN = "print(os.environ.get('GOMP_SPINCOUNT'))"
BUSY = "print(flush=True)\nwhile True: pass"


def answer(**variables: str) -> str:
    own = {key: value for key, value in os.environ.items() if "OMP_" not in key}
    asked = [sys.executable, "-c", ASK + SPIN]
    done = subprocess.run(asked, env=own | variables, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what runs")
def test_threads_do_not_spin_where_others_want_the_cores_unless_told_to() -> None:
    cores = os.cpu_count() or 1
    busy = [sys.executable, "-c", BUSY]
    others = [subprocess.Popen(busy, stdout=subprocess.PIPE) for _ in range(cores)]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()  # it has begun
        assert answer() == "0"
        assert answer(GOMP_SPINCOUNT="7") == "7"
        assert answer(OMP_WAIT_POLICY="active") == "None"
    finally:
        for other in others:
            other.kill()
            other.communicate()
