"""Ask PyPI for known vulnerabilities of what is installed: ``audit.py SITE-PACKAGES…``.

Fails for a vulnerability. Says so, and does not fail, where nobody can be asked.
"""

from __future__ import annotations

import json
import subprocess
import sys

_MOST_LISTED = 10


def main(paths: list[str]) -> int:
    """Audit environments; return the exit status."""
    command = [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off"]
    command += ["--skip-editable", "--timeout=20", *(f"--path={path}" for path in paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        if "onnection" not in done.stderr and "imeout" not in done.stderr:
            sys.stderr.write(done.stderr)
            return 1
        print("NOT AUDITED: the vulnerability service can't be reached from this machine.")
        print(done.stderr.strip().rpartition("\n")[2][:300])
        return 0
    skipped = [one["name"] for one in found if "skip_reason" in one]
    asked = [one for one in found if "skip_reason" not in one]
    vulnerable = [one for one in asked if one["vulns"]]
    for one in vulnerable:
        for flaw in one["vulns"]:
            fixed = ", ".join(flaw["fix_versions"]) or "no version yet"
            print(f"VULNERABLE: {one['name']} {one['version']}: {flaw['id']}; fixed in {fixed}")
    print(f"{len(asked)} packages audited, {len(vulnerable)} vulnerable.")
    if not asked:
        print("NOT AUDITED: the package registry that is reached here has no vulnerability data.")
    elif skipped:
        listed = ", ".join(skipped[:_MOST_LISTED]) + " …" * (len(skipped) > _MOST_LISTED)
        print(f"NOT AUDITED: {len(skipped)} that the service didn't know: {listed}")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
