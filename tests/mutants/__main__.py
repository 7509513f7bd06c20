"""Runs the mutants and writes docs/mutants.md; exit status 1 if one is not caught.

With names of files below lfu_reg/ as arguments it runs those of these files, and those that are not on the page yet.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

from tests.mutants.catalogue import MUTANTS
from tests.mutants.run import ROOT, check_tests_pass, is_caught

PAGE = Path("docs/mutants.md")
_HEAD = """# Guards taken out

Each guard of the library was taken out of a copy of it, and the named test run on that copy: it has to fail.
`make mutants` does so and writes this page.

| row | guard | file | test | without the guard |
|---|---|---|---|---|
"""


def main(files: Collection[str]) -> int:
    known = set((ROOT / PAGE).read_text().splitlines()) if files else set()
    before = {m: f"| {m.row} | {m.what} | `{m.file}` | `{m.test}` | " for m in MUTANTS}
    chosen = [m for m in MUTANTS if m.file in files or f"{before[m]}fails |" not in known]
    check_tests_pass(chosen)
    lines, survivors = [], 0
    for mutant in MUTANTS:
        verdict = "fails"
        if mutant in chosen:
            caught = is_caught(mutant)
            survivors += not caught
            verdict = "fails" if caught else "**passes**"
            print(f"{verdict:>10}  row {mutant.row}: {mutant.what}", flush=True)
        lines.append(f"{before[mutant]}{verdict} |")
    (ROOT / PAGE).write_text(_HEAD + "\n".join(lines) + "\n")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
