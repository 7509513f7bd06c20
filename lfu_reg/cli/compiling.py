"""torch.compile of several methods in one process."""

from __future__ import annotations

from contextlib import AbstractContextManager


def graphs_apart() -> AbstractContextManager[None]:
    """Context in which every method gets graphs of its own.

    Each method has a module tree of the same classes with other hooks. Their graphs must not be taken for each other's,
    and all of them count towards the number of times that a function is compiled before torch gives up on it.
    """
    from torch._dynamo import config

    changes: dict[str, object] = {"skip_nnmodule_hook_guards": False}
    prefix = "recompile" if hasattr(config, "recompile_limit") else "cache_size"  # torch 2.6
    changes |= {f"{prefix}_limit": 256, f"accumulated_{prefix}_limit": 2048}
    patched: AbstractContextManager[None] = config.patch(changes)
    return patched
