"""The versions that are promised: `nox -l` lists the sessions, `nox -s versions -- PATHS` runs some of their tests.

Every session installs the package as a user does, into an environment of its own.
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["alone", "versions"]

TORCH = {"2.6": ["torch==2.6.0", "numpy"], "newest": ["torch"]}
TRANSFORMERS = {
    "4.51": ["transformers==4.51.3", "peft==0.14.0", "accelerate==1.0.0"],
    "newest": ["transformers", "peft", "accelerate"],
}
TOOLS = ["pytest>=8", "hypothesis>=6.100", "typer>=0.15", "rich>=13"]
# What depends on versions most: models of every kind against the oracle, adapters, hooks, errors, the command.
TESTS = ["tests/whole", "tests/model", "tests/hooks", "tests/step", "tests/auxiliaries", "tests/cli"]
# Imports with every warning an error, and prints all that anybody would see.
QUIET = ["python", "-W", "error", "-c", "import lfu_reg, sys; assert 'transformers' not in sys.modules"]


@nox.session
def alone(session: nox.Session) -> None:
    """With torch and nothing else: the import prints nothing, and a step runs."""
    session.install(".")
    said = session.run(*QUIET, silent=True, stderr=None)
    if said:
        session.error(f"import lfu_reg printed: {said}")
    session.run("python", "tests/support/first_step.py")


@nox.session
@nox.parametrize("transformers", list(TRANSFORMERS))
@nox.parametrize("torch", list(TORCH))
def versions(session: nox.Session, torch: str, transformers: str) -> None:
    """The tests with the oldest and the newest versions."""
    session.install(*TORCH[torch], *TRANSFORMERS[transformers], *TOOLS)
    session.install("--no-deps", ".")
    session.run("python", "-m", "pytest", *(session.posargs or TESTS), env={"HF_HUB_OFFLINE": "1"})
