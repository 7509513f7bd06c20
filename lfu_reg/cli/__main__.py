"""`python -m lfu_reg.cli` is the command `lfu-reg`."""

from lfu_reg.cli import main

if __name__ == "__main__":
    main()
