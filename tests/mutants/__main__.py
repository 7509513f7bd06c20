"""Runs the mutants and writes docs/mutants.md; exit status 1 if one is not caught."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.mutants.catalogue import MUTANTS
from tests.mutants.run import ROOT, is_caught

PAGE = Path("docs/mutants.md")
_HEAD = """# Guards taken out

Each guard of the library was taken out of a copy of it, and the named test run on that copy: it has to fail.
`make mutants` does so and writes this page.

| row | guard | file | test | without the guard |
|---|---|---|---|---|
"""


def main() -> int:
    lines, survivors = [], 0
    for mutant in MUTANTS:
        caught = is_caught(mutant)
        survivors += not caught
        verdict = "fails" if caught else "**passes**"
        lines.append(f"| {mutant.row} | {mutant.what} | `{mutant.file}` | `{mutant.test}` | {verdict} |")
        print(f"{verdict:>10}  row {mutant.row}: {mutant.what}", flush=True)
    (ROOT / PAGE).write_text(_HEAD + "\n".join(lines) + "\n")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
