"""What users get wrong, and what the program says: every case's message, and whether all that was there is still there.

Each case is a command in a fresh folder. It has to end with exit code 2 and a message that names what is wrong, in one
line; nothing that was in the folder may have changed, and no file may be left half-written. Two more cases, a full
disk and one that cannot be written, are tried where disks in memory may be mounted (by root, on Linux).

Run: ``python benchmarks/bad_inputs.py`` (writes docs/results/bad_inputs.json and .md).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import tempfile
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from bad_input_cases import CASES, DISKS, Case, may_mount
from tdm_r1 import cli


def tried(case: Case) -> dict[str, Any]:
    """Runs a case in a folder of its own; what it said, and what is wrong with that."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as place, ExitStack() as held:
        folder = Path(place)
        if case.setup:
            case.setup(folder)
        if case.within:
            held.enter_context(case.within(folder))
        kept = digests(folder)
        os.chdir(folder)
        out, err, start = io.StringIO(), io.StringIO(), time.perf_counter()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                code: Any = cli.main(case.args)
        except SystemExit as end:
            code = end.code
        except BaseException as error:  # what no user should see
            code, _ = f"{type(error).__name__}", err.write(f"{type(error).__name__}: {error}")
        finally:
            os.chdir(before)
        seconds = time.perf_counter() - start
        shown = re.sub(r"[│╭╮╰╯─]+|Loading weights:[^\]]*\]", " ", err.getvalue())  # a box, and bars of loading
        said = " ".join(shown.replace(place, "").split())
        said = said.removeprefix("Value error ").replace("-" * 78, "").strip()
        after = digests(folder)
        wrong = [] if code == 2 else [f"exit code {code}"]
        wrong += [] if case.says in said or case.says in "".join(said.split()) else [f"does not say {case.says!r}"]
        wrong += ["a traceback"] if "Traceback" in said else []
        wrong += [f"{name} is lost" for name in kept if name not in after]
        wrong += [f"{name} has changed" for name in kept if name in after and after[name] != kept[name]]
        wrong += [f"{name} is left" for name in after if name.endswith(".partial")]
    row = {"kind": case.kind, "case": case.what, "says": said, "seconds": round(seconds, 1), "wrong": wrong}
    print(f"{case.kind}, {case.what}: {said}" + (f"   WRONG: {wrong}" if wrong else ""), flush=True)
    return row


def digests(folder: Path) -> dict[str, str]:
    """Of every file, but for the locks that a run leaves."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def markdown(rows: list[dict[str, Any]]) -> str:
    right = sum(not r["wrong"] for r in rows)
    lines = [
        "# Bad input",
        "",
        f"Written by `python benchmarks/bad_inputs.py`; not edited by hand. {len(rows)} commands with something wrong,",
        "each in a fresh folder. A case is right if the command ends with exit code 2 and a message that names what is",
        f"wrong, and everything that was in the folder is unchanged. {right} of {len(rows)} are right.",
        "",
        "| input | what is wrong with it | what the program says | seconds |",
        "|---|---|---|---|",
    ]
    for r in rows:
        said = r["says"].removeprefix("tdm-r1: ").replace("|", "\\|")
        said = said if len(said) < 400 else f"{said[:400]} ..."
        said += f" **Wrong: {'; '.join(r['wrong'])}**" if r["wrong"] else ""
        lines.append(f"| {r['kind']} | {r['case']} | {said} | {r['seconds']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/bad_inputs.json"))
    parser.add_argument("--only", default="", help="cases whose kind or description has this in it")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    cases = [*CASES, *(DISKS if may_mount() else [])]
    rows = [tried(case) for case in cases if args.only in f"{case.kind}, {case.what}"]
    if not args.only:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(rows))
    wrong = [r for r in rows if r["wrong"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} are right")


if __name__ == "__main__":
    main()
