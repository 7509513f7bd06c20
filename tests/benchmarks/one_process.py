"""Stands in for the pool of processes that runs of the evidence are made by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from evidence import run
from evidence.finetune import Spec

Job = tuple[Spec, str]


def in_one_process(patch: pytest.MonkeyPatch, imap: Callable[[Any, list[Job]], Iterable[Any]] = map) -> None:
    """Let runs be made in this process by `imap`, which gets what works and the jobs."""

    class Pool:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def imap_unordered(self, work: Any, jobs: list[Job]) -> Iterable[Any]:
            return imap(work, jobs)

    patch.setattr(run.multiprocessing, "get_context", lambda kind: type("Context", (), {"Pool": Pool}))
