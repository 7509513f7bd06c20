"""Whether hooks are where they should be, and fired: a module past which the call goes gets no component.

A chosen layer that never runs is looked at in `checks.check_layers_ran`; here it is the modules inside of a layer at
which the auxiliary acts (LoRA's linear maps). Some of them rightly never fire: a weight may be lent to a function, an
expert not be chosen. So there is one warning; only what can have no other cause than a stale graph is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lfu_reg.diagnostics import Diagnostics
from lfu_reg.hooks.forward_pass import ForwardPass
from lfu_reg.model.compile import holds_compiled
from lfu_reg.model.linears import base_layer
from lfu_reg.model.names import listed

SILENT = (
    "These modules never ran although their layers did, so LfU does not act on them: {}. Nothing is wrong where their "
    "weight is used without calling them (Mamba's dt_proj) or a router did not choose them; leave them out with "
    "LoRADeltas(target_modules=...) to have silence. Modules that are run as module.forward(x) or by a fused kernel "
    "bypass their hooks: call module(x). In a compiled model, call torch.compiler.reset() once after attaching."
)
STALE = (
    "torch.compile ran a graph that knows nothing of the hooks in {}, so LfU would have no effect there. The graph was "
    "made for another model of the same classes, which has no hooks. Set torch._dynamo.config."
    "skip_nnmodule_hook_guards = False before the models first run, or call torch.compiler.reset() after attaching."
)
UNEVEN = (
    "These modules ran another number of times in pass 2 than in pass 1: {}. With routed experts that is the "
    "perturbation's doing; else the model's control flow depends on something that a second call does not repeat: "
    "leave these out with layers=... or LoRADeltas(target_modules=...)."
)
OLD_BACKWARD_HOOKS = (
    "These modules have hooks of register_backward_hook, which torch puts on the last operation of what a module "
    "returns: during a step of LfU that is another one, and a hook that changes gradients changes others than in plain "
    "training: {}. Use register_full_backward_hook."
)


class Coverage:
    """Watches the sites of one regularizer."""

    def __init__(self, layers: Collection[str], sites: Mapping[str, nn.Module], diagnostics: Diagnostics) -> None:
        # torch.nn.MultiheadAttention lends the weight of its out_proj, which is the only module of this class.
        called = [name for name, site in sites.items() if type(site) is not NonDynamicallyQuantizableLinear]
        inner = {layer: [site for site in called if site.startswith(f"{layer}.")] for layer in layers}
        self._inside = {layer: found for layer, found in inner.items() if found}
        self._diagnostics = diagnostics

    def check(self, fwd: ForwardPass, model: nn.Module) -> None:
        """Look at pass 1; raises if a layer of a compiled model ran without any hook inside of it."""
        silent: list[str] = []
        for layer, sites in self._inside.items():
            missing = [site for site in sites if not fwd.record.fired[site]] if fwd.record.fired[layer] else []
            if missing == sites and (fwd.record.compiled or holds_compiled(model)):
                raise RuntimeError(STALE.format(layer))
            silent += missing
        if fwd.record.old_backward_hooks:
            self._diagnostics.warn_once(
                "backward hooks", OLD_BACKWARD_HOOKS.format(listed(fwd.record.old_backward_hooks, 8))
            )
        if silent:
            self._diagnostics.warn_once("silent", SILENT.format(listed(silent, 8)))

    def compare(self, clean: ForwardPass, perturbed: ForwardPass) -> None:
        """Look at pass 2, where it ran on all samples and to the end of the layers."""
        sites = [site for found in self._inside.values() for site in found]
        uneven = [site for site in sites if clean.record.fired[site] != perturbed.record.fired[site]]
        if uneven:
            self._diagnostics.warn_once("uneven", UNEVEN.format(listed(uneven, 8)))


class Targets:
    """Where some modules of a model are."""

    # PEFT puts an adapter layer in the place of a linear map, and `merge_and_unload` a linear map in the place of an
    # adapter layer. Hooks stay with the module that was taken out: they never fire again, or fire inside of an adapter
    # layer. Other wrappers (compiled, sharded, checkpointed modules) run what they wrap, and so its hooks.

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
        if base_layer(module) is inner:
            return False
        found = found or module is inner
    return found
