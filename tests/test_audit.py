"""What `make audit` makes of answers: .ci/audit.py, with a pip-audit that gives them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[1] / ".ci" / "audit.py"
GOOD = {"name": "numpy", "version": "2.4.6", "vulns": []}
FLAW = {"id": "PYSEC-2026-1", "fix_versions": ["6.1"], "aliases": [], "description": "…"}
BAD = {"name": "protobuf", "version": "6.0", "vulns": [FLAW]}
UNKNOWN = {"name": "distckpt", "skip_reason": "Dependency not found on PyPI"}


@pytest.fixture
def audit(tmp_path):
    """Run the audit; `stdout`, `stderr` and `status` are what pip-audit answers."""

    def run(stdout="", stderr="", status=0):
        (tmp_path / "pip_audit.py").write_text(
            f"import sys\nsys.stdout.write({stdout!r})\nsys.stderr.write({stderr!r})\n"
            f"sys.exit({status})\n"
        )
        done = subprocess.run(
            [sys.executable, AUDIT, "site-packages"],
            env={"PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def answer(*packages):
    return json.dumps({"dependencies": packages, "fixes": []})


def test_a_vulnerability_fails_and_is_named_with_what_fixes_it(audit):
    status, said, _ = audit(answer(GOOD, BAD), "Found 1 known vulnerability", 1)
    assert status == 1
    assert "VULNERABLE: protobuf 6.0: PYSEC-2026-1; fixed in 6.1\n" in said
    assert "2 packages audited, 1 vulnerable." in said


def test_no_vulnerability_passes(audit):
    status, said, _ = audit(answer(GOOD))
    assert (status, said) == (0, "1 packages audited, 0 vulnerable.\n")


def test_what_the_service_does_not_know_is_named(audit):
    status, said, _ = audit(answer(GOOD, UNKNOWN))
    assert status == 0
    assert "NOT AUDITED: 1 that the service didn't know: distckpt\n" in said


@pytest.mark.parametrize("packages", [(), (UNKNOWN,)])
def test_where_nothing_was_audited_that_is_said(audit, packages):
    status, said, _ = audit(answer(*packages))
    assert status == 0
    assert "NOT AUDITED: the package registry" in said


@pytest.mark.parametrize(
    "fault",
    [
        "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='pypi.org', port=443)",
        "ERROR:pip_audit._cli:Tip: your network may be blocking this service. Connection timed out",
    ],
)
def test_where_no_service_is_reached_that_is_said_and_does_not_fail(audit, fault):
    status, said, _ = audit("", fault, 1)
    assert status == 0
    assert "NOT AUDITED: the vulnerability service can't be reached" in said


def test_an_audit_that_breaks_fails(audit):
    status, _, errors = audit("", "Traceback: pip-audit has a bug", 1)
    assert status == 1
    assert "has a bug" in errors
