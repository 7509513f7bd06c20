"""`import lfu_reg` needs torch alone; an integration whose package is missing names the extra that brings it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Packages that are there, but not importable.
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
EXTRAS = ("transformers", "peft", "accelerate", "trl", "datasets", "lightning", "typer", "rich", "tokenizers")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_prints_nothing() -> None:
    """With torch alone as well, where numpy is missing, of which torch would tell."""
    for packages in ((), ("numpy", *EXTRAS)):
        code = WITHOUT.format(packages=packages) + "import lfu_reg"
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_import_needs_torch_alone() -> None:
    code = WITHOUT.format(packages=EXTRAS) + "import lfu_reg, lfu_reg.integrations, lfu_reg.integrations.trainer\n"
    python(code + "print(lfu_reg.LfURegularizer)")


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("hf", "transformers", "hf"), ("trl", "trl", "trl"), ("lightning", "lightning", "lightning")],
)
def test_missing_extra_is_named(module: str, package: str, extra: str) -> None:
    code = WITHOUT.format(packages=(package,)) + (
        f"try:\n    import lfu_reg.integrations.{module}\nexcept ImportError as error:\n    print(error)\n"
    )
    assert f"pip install 'lfu_reg[{extra}]'" in python(code)
