"""What this project depends on: the licence of every package, and known vulnerabilities of the pinned versions.

Run: ``make audit``. It writes docs/licences.md, and fails on known vulnerabilities, unknown licences and those like the
GPL.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("", "ocr", "vlm", "ray")  # those that the tests install; the others are named in the README
COPYLEFT = re.compile(
    r"\b(A?GPL|GNU (Affero )?General Public|SSPL|Commons Clause|CC-BY-NC|Non-?Commercial)", re.IGNORECASE
)
UNREACHABLE = re.compile(r"ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|NameResolutionError")
LICENCES = Path("docs/licences.md")


def required(name: str, extras: tuple[str, ...], found: set[str]) -> set[str]:
    """The packages that ``name`` needs with its extras, and what those need; adds them to ``found``."""
    for text in metadata.requires(name) or []:
        need = Requirement(text)
        wanted = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras)
        other = need.name.lower().replace("_", "-")
        if wanted and other not in found:
            found.add(other)
            required(other, ("", *need.extras), found)
    return found


def licences() -> list[dict[str, str]]:
    """Name, version and licence of everything that users install."""
    packages = sorted(required("tdm-r1", EXTRAS, set()) - {"tdm-r1"})
    command = ["pip-licenses", "--from=mixed", "--format=json", "--packages", *packages]
    done = subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], capture_output=True, check=True)
    rows: list[dict[str, str]] = json.loads(done.stdout)
    return sorted(rows, key=lambda row: row["Name"].lower())


def vulnerable() -> list[str]:
    """Known vulnerabilities of the pinned versions; tells how many packages the service knows."""
    command = ["pip-audit", "--requirement=constraints.txt", "--no-deps", "--disable-pip", "--format=json"]
    done = subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], capture_output=True, text=True)
    if not done.stdout.strip() and not UNREACHABLE.search(done.stderr):
        sys.exit(f"pip-audit failed:\n{done.stderr}")
    if not done.stdout.strip():
        print(
            f"advisories: the service cannot be reached, nothing was checked ({done.stderr.strip().splitlines()[-1:]})"
        )
        return []
    rows = json.loads(done.stdout)["dependencies"]
    known = [row for row in rows if "skip_reason" not in row]
    print(f"advisories: the service knows {len(known)} of {len(rows)} pinned packages")
    return [
        f"{row['name']} {row['version']}: {', '.join(v['id'] for v in row['vulns'])}" for row in known if row["vulns"]
    ]


def page(rows: list[dict[str, str]]) -> str:
    lines = [
        "# Licences",
        "",
        "Of the packages that tdm-r1 with the extras ocr, vlm and ray needs. Written by `make audit`.",
    ]
    lines += ["A torch with CUDA brings NVIDIA's packages, under NVIDIA's licences."]
    lines += ["", "| package | licence |", "|---|---|", *(f"| {row['Name']} | {row['License']} |" for row in rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = licences()
    LICENCES.write_text(page(rows), encoding="utf-8")
    wrong = [f"{r['Name']}: {r['License']}" for r in rows if COPYLEFT.search(r["License"]) or "UNKNOWN" in r["License"]]
    found = vulnerable()
    for line in [*wrong, *found]:
        print(line)
    if wrong or found:
        sys.exit(1)
    print(f"licences: {len(rows)} packages ({LICENCES}), none unknown or like the GPL")


if __name__ == "__main__":
    main()
