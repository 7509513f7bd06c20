"""The user's loss function as each pass of a step calls it: on a batch of its own, from the same random state."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lfu_reg.hooks.early_exit import EarlyExit, call_loss_function
from lfu_reg.model.rng import RandomState
from lfu_reg.model.tables import attributes, tensors_in
from lfu_reg.model.tokens import TokenMask, TokenMasks
from lfu_reg.step import loss_checks

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]

# Arguments that hold per-position vectors without a batch dimension.
_UNBATCHED = ("cache_position", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")

_repeating: ContextVar[bool] = ContextVar("lfu_reg_repeating", default=False)


@contextmanager
def repeating() -> Iterator[None]:
    """The loss function runs again in the block: `is_second_pass` says so."""
    token = _repeating.set(True)
    try:
        yield
    finally:
        _repeating.reset(token)


def is_repeating() -> bool:
    """Whether any regularizer calls a loss function again at present."""
    return _repeating.get()


class SFTLoss:
    """The user's loss function, with what it is called with."""

    def __init__(
        self, function: LossFunction, model: Any, batch: Any, token_mask: TokenMask | None, ignore_index: int
    ) -> None:
        self.model = model
        self.function, self._token_mask, self._ignore_index = function, token_mask, ignore_index
        self.tokens = self.tokens_of(batch)
        # For later passes: new containers, as the function may take entries out of the batch or put some in, with the
        # user's own tensors. An iterator is recorded and played again.
        self._given: Any = Recorded(batch) if isinstance(batch, Iterator) else batch
        self._kept = Kept(self._given)
        self.batch: Any = self._kept.value

    def tokens_of(self, batch: Any) -> TokenMasks:
        """Which tokens of a batch count."""
        return TokenMasks(batch, self._token_mask, self.model, ignore_index=self._ignore_index)

    def first(self, devices: Iterable[torch.device], *, check_value: bool) -> Tensor:
        """The loss of pass 1. Later passes start from the random state of `devices` that this one finds."""
        self._random_start, self._check_value = RandomState.capture(devices), check_value
        loss = call_loss_function(self.function, self.model, self._given)
        return loss_checks.check_loss(loss, self.model, first=check_value)

    def has_drawn(self) -> bool:
        """Whether pass 1 drew random numbers from torch."""
        return self._random_start.torch_has_drawn()

    def again(self, batch: Any) -> Tensor:
        """The loss of this batch, with the random draws of pass 1."""
        with repeating():
            self._random_start.restore()
            loss = call_loss_function(self.function, self.model, self._fresh(batch))
        return loss_checks.check_loss(loss, self.model, first=self._check_value)

    def repeat(self, samples: Tensor | None, batch_size: int) -> None:
        """Call the function again for its forward only, on some samples of the batch or on all."""
        batch = self._fresh(self.batch)
        if samples is not None:
            batch = select_samples(batch, samples, batch_size)
        with repeating(), torch.enable_grad():  # which puts back what the pass may switch off
            self._random_start.restore()
            try:
                call_loss_function(self.function, self.model, batch)
            except EarlyExit as early:  # its frames hold activations, and some of them the exception
                traceback.clear_frames(early.__traceback__)

    def _fresh(self, batch: Any) -> Any:
        """The batch for one more call."""
        return self._kept.again() if batch is self.batch else copied(batch)


class Kept:
    """Data as it was given to a call, with the user's own tensors, for another call."""

    def __init__(self, value: Any) -> None:
        self.value = copied(value)
        tensors = {id(tensor): tensor for tensor in tensors_in(self.value) if not tensor.is_inference()}
        self._before = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors.values()]

    def again(self) -> Any:
        """The same in new containers, with copies of the tensors that were written to in place since."""
        if isinstance(self.value, Recorded):
            return self.value.again()
        written = {id(t): before.clone() for t, version, before in self._before if t._version != version}
        return copied(self.value, written)


class Recorded:
    """An iterator that notes down what is taken from it, to give the same again to another pass."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._taken: list[Kept] = []

    def __iter__(self) -> Recorded:
        return self

    def __next__(self) -> Any:
        item = next(self._iterator)
        self._taken.append(Kept(item))
        return item

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._iterator, name)

    def again(self) -> Iterator[Any]:
        """What was taken, from the first on."""
        return iter([item.again() for item in self._taken])


def copied(value: Any, made: dict[int, Any] | None = None) -> Any:
    """`value` with new containers; leaves are the same objects, but for those in whose place others are `made`."""
    made = {} if made is None else made  # what is there twice, or holds itself, is so in the copy
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, (Recorded, Tensor, nn.Module, str, bytes, int, float, type(None))) or callable(value):
        return value
    if type(value) in (tuple, set, frozenset):
        return type(value)(copied(entry, made) for entry in value)
    if isinstance(value, tuple):
        return type(value)(*(copied(entry, made) for entry in value)) if hasattr(value, "_fields") else value
    try:
        result = made[id(value)] = copy.copy(value)
        made.setdefault(0, []).append(value)  # alive, or an object that a mapping makes next has its id
        if isinstance(value, Mapping) and hasattr(value, "__setitem__"):
            for key in value:
                result[key] = copied(value[key], made)
        elif isinstance(value, list):
            result[:] = [copied(entry, made) for entry in value]
        else:
            for name, entry in attributes(result).items():
                if isinstance(entry, (list, tuple, dict, set, Tensor)):
                    object.__setattr__(result, name, copied(entry, made))  # also where it is frozen
    except Exception:  # what cannot be copied (a loader, a lock) is shared, as it is with the caller
        made[id(value)] = value
    return made[id(value)]


def select_samples(value: Any, samples: Tensor, batch_size: int, name: str = "") -> Any:
    """`value` with every tensor in it that has one entry per sample reduced to `samples`."""
    if isinstance(value, Tensor):
        per_sample = value.dim() > 0 and len(value) == batch_size and not (value.dim() == 1 and name in _UNBATCHED)
        return value.index_select(0, samples.to(value.device)) if per_sample else value
    if isinstance(value, Mapping):
        part = {key: select_samples(entry, samples, batch_size, str(key)) for key, entry in value.items()}
        if type(value) is dict or not hasattr(value, "__setitem__"):
            return part
        result: Any = copy.copy(value)  # of the same class: transformers' batches have attributes as well
        for key, entry in part.items():
            result[key] = entry
        return result
    if isinstance(value, tuple) and (names := getattr(value, "_fields", None)):
        return type(value)(*(select_samples(v, samples, batch_size, n) for n, v in zip(names, value, strict=True)))
    if isinstance(value, (tuple, list)):
        return type(value)(select_samples(entry, samples, batch_size, name) for entry in value)
    entries = {} if isinstance(value, nn.Module) or callable(value) else getattr(value, "__dict__", {})
    if any(True for entry in entries.values() for _ in tensors_in(entry)):  # and no logger, say, which has parents
        value = copy.copy(value)
        for key, entry in entries.items():
            vars(value)[key] = select_samples(entry, samples, batch_size, key)
    return value


class PlainSFT(Exception):
    """This step is plain SFT, whose loss this is, with its gradients."""

    def __init__(self, loss: Tensor) -> None:
        super().__init__()
        self.loss = loss
