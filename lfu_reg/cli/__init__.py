"""The command `lfu-reg`: what LfU costs on a given model, what it would hook there, and whether it helps."""

import logging
import warnings


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: with the command's exit code: 0, or 2 for what cannot be used.
    """
    for name in ("torchao", "torch.utils._pytree"):  # what they say of themselves while PEFT loads them
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of other packages, about each other
    try:
        from lfu_reg.cli.app import app
    except ModuleNotFoundError as error:
        raise SystemExit(f"lfu-reg needs {error.name}, which is not installed: pip install 'lfu_reg[cli]'") from error
    app()
