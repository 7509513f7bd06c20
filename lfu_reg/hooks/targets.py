"""Whether modules that carry our hooks are still where they were, and no others beside them.

PEFT puts an adapter layer in the place of a linear map, and `merge_and_unload` a linear map in the place of an adapter
layer. Hooks stay with the module that was taken out: they never fire again, or fire inside of an adapter layer, where
the output is not yet that of the map. Other wrappers (compiled, sharded, checkpointed modules) run what they wrap, and
so its hooks.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lfu_reg.model import peft as adapters


class Targets:
    """Where some modules of a model are."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._children: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
        self._lists: dict[nn.Module, int] = {}
        for name in names:
            parent = model
            for key in name.split(".") if name else ():
                child = parent.get_submodule(key)
                self._children[id(parent), key] = parent, key, child
                if isinstance(parent, (nn.ModuleList, nn.Sequential)):
                    self._lists[parent] = len(parent._modules)
                parent = child

    def forget(self) -> None:
        """Let go of the model."""
        self._children, self._lists = {}, {}

    def were_replaced(self) -> bool:
        """Whether a module, or one above it, no longer runs as it was, or a list of blocks has another length."""
        if any(len(blocks._modules) != length for blocks, length in self._lists.items()):
            return True
        for place, (parent, key, child) in self._children.items():
            now = parent._modules.get(key)
            if now is child:
                continue
            if now is None or not _runs(now, child):
                return True
            self._children[place] = parent, key, now
        return False


def _runs(wrapper: nn.Module, inner: nn.Module) -> bool:
    found = False
    for module in wrapper.modules():
        if adapters.base_layer(module) is inner:
            return False
        found = found or module is inner
    return found
