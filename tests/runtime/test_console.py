"""Output that nobody takes ends no run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from workflow import ROOT

from vicreg_hf.runtime.console import optional
from vicreg_hf.runtime.signals import Stopped

TALKS = """
import sys
from vicreg_hf.runtime.console import outlive_readers
outlive_readers()
for _ in range(3):
    print("word " * 10_000, flush=True)
    print("word", file=sys.stderr)
print("buffered")
"""


@pytest.mark.parametrize("lost", ["the reader of both", "the reader of stdout", "room for either"])
def test_what_prints_for_nobody_ends_well(lost: str) -> None:
    reading, pipe = os.pipe()
    os.close(reading)
    out = os.open("/dev/full", os.O_WRONLY) if "room" in lost else pipe
    err = subprocess.PIPE if "stdout" in lost else out
    python = [sys.executable, "-c", TALKS]
    done = subprocess.run(python, cwd=ROOT, stdout=out, stderr=err, check=True)
    assert done.stderr in (None, b"word\n" * 3)
    for stream in {pipe, out}:
        os.close(stream)


def test_an_extra_that_fails_is_a_warning_but_a_request_to_stop_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with optional("the card has no pictures"):
        raise KeyError("a\nfont")
    assert capsys.readouterr().err == "warning: the card has no pictures: KeyError: 'a\\nfont'\n"
    with pytest.raises(Stopped), optional("the card has no pictures"):
        raise Stopped
