"""The pass that a checkpointed block belongs to, while the block runs again after the step is over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

from lfu_reg.auxiliaries.base import Auxiliary
from lfu_reg.hooks.forward_pass import Pass
from lfu_reg.model import checkpointing
from lfu_reg.model.buffers import on_copies
from lfu_reg.model.patching import substituted

REMOVED = (
    "backward() reached a checkpointed block of a loss of LfURegularizer after remove(): the block cannot run again as "
    "it did. Call remove() after backward()."
)


class Repeats:
    """Sets passes up again for blocks that are repeated, each in the thread that repeats it.

    Args:
        auxiliary: theta_aux.
        changed: called after every change of `running`.

    Attributes:
        running: by thread, the pass whose block is running again there, and the components that it had.
        possible: False once the hooks are off the model.
    """

    def __init__(self, auxiliary: Auxiliary, changed: Callable[[], None]) -> None:
        # Not thread-local: a hook has to see at a glance, also when it is compiled, that there is nothing to look up.
        self.running: dict[int, tuple[Pass, Auxiliary]] = {}
        self.possible = True
        self._auxiliary, self._changed = auxiliary, changed

    def prepared(self, this: Pass) -> AbstractContextManager[None]:
        """Context of a pass, in which checkpoints are told what they belong to if the graph outlives it.

        Raises:
            RuntimeError: in the block, at a checkpoint that could not be repeated.
        """
        if not this.outlives:
            return nullcontext()
        if not checkpointing.can_be_repeated():
            return checkpointing.refused("this version of torch has no way to tell a block what to repeat")
        frozen = self._auxiliary.frozen()
        if frozen is None:
            kind = type(self._auxiliary).__name__
            return checkpointing.refused(f"{kind}.frozen() does not say how to keep the components of a step")
        # Without the states, which would be a cycle through the graph that holds on to the checkpoint.
        slim = replace(this, capture=None, recording=False, states=[], taps=[], watched=[])
        return checkpointing.repeated_in(partial(self._again, slim, frozen))

    @contextmanager
    def _again(self, this: Pass, frozen: Auxiliary) -> Iterator[None]:
        if not self.possible:
            raise RuntimeError(REMOVED)
        thread = threading.get_ident()
        before = self.running.get(thread)
        self.running[thread] = this, frozen
        self._changed()
        try:
            with substituted(this.replaced), on_copies(this.buffers):
                yield
        finally:
            if before is None:
                del self.running[thread]
            else:
                self.running[thread] = before
            self._changed()
