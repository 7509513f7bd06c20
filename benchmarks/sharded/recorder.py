"""Counts collectives by kind, whoever starts them. Also used by the tests of the distributed step."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {  # by the name of the operator
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "broadcast_": "broadcast",
}


class Collectives(TorchDispatchMode):
    """Notes every collective in its block.

    Attributes:
        counts: how many, by kind.
        bytes: of the whole tensors, by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it comes back with the local tensors
        result = func(*args, **(kwargs or {}))
        namespace, name = func.name().split("::")
        if namespace in ("c10d", "_c10d_functional") and "wait" not in name and "wrap" not in name:
            kind = KINDS[name.split(".")[0]]  # an unknown one is an error, not a gap
            # What is gathered to or scattered from is the largest of the tensors given and returned.
            tensors = [leaf for leaf in tree_leaves([args, result]) if isinstance(leaf, Tensor)]
            self.counts[kind] += 1
            self.bytes[kind] += max(tensor.nbytes for tensor in tensors)
        return result
