"""Which positions of a hidden state count: response tokens, else unpadded tokens, else all of them.

A hidden state [batch, tokens, hidden] is seen as rows [positions, hidden]. `TokenMasks` is built once per step from the
batch, before the loss function can change it, and answers for the shape of each layer's output which rows count: layers
of one model may differ in layout (time first, flattened, channels first) and in length (encoder and decoder).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TokenMask = Tensor | Callable[[Any], Tensor]

IGNORED_LABEL = -100


def rows(hidden: Tensor, axis: int = -1, index: Tensor | None = None) -> Tensor:
    """`hidden` as [positions, hidden], all rows or those that `index` selects.

    Without an index it is a view, for contiguous tensors whose hidden axis is the last.
    """
    if axis not in (-1, hidden.dim() - 1):
        hidden = hidden.movedim(axis, -1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat if index is None else flat.index_select(0, index)


class TokenMasks:
    """The masks that a batch offers, matched to hidden states by shape.

    Args:
        batch: the user's batch; entries `labels`, `attention_mask`, `decoder_attention_mask` are looked at if it has
            them.
        token_mask: overrides them: a tensor shaped like the token dimensions (nonzero counts), or a callable of the
            batch.
        virtual_tokens: gives the number of positions that the model puts in front of the batch's own (PEFT's prompt
            tuning). It is asked where no mask fits as it is; they are then added to it as PEFT adds them: attended to,
            but not a label, nor chosen by the user.

    Raises:
        TypeError: if `token_mask` gives something else than a tensor.
    """

    def __init__(
        self, batch: Any, token_mask: TokenMask | None = None, virtual_tokens: Callable[[], int] | None = None
    ) -> None:
        labels, attention = _entry(batch, "labels"), _entry(batch, "attention_mask")
        self.given: Tensor | None = None
        if token_mask is not None:
            given = token_mask(batch) if callable(token_mask) else token_mask
            if not isinstance(given, Tensor):
                raise TypeError(
                    f"token_mask gave {type(given).__name__}; allowed are a tensor shaped like the token dimensions "
                    "(for example [batch, tokens], nonzero where a token counts) or a callable of the batch that "
                    "returns one."
                )
            self.given = given != 0
        self._labels = None if labels is None or not _is_integer(labels) else torch.ne(labels, IGNORED_LABEL)
        self._attention = _binary(attention)
        self._decoder_attention = _binary(_entry(batch, "decoder_attention_mask"))
        self._virtual = virtual_tokens or _none
        self._cache: dict[Any, tuple[Tensor | None, Tensor | None]] = {}
        self.matched_given = self.matched = False

    def match(self, hidden: Tensor, axis: int, *, encoder: bool) -> tuple[Tensor | None, Tensor | None]:
        """The positions of a hidden state that count.

        Args:
            hidden: the hidden state.
            axis: its hidden axis.
            encoder: whether it is one of the encoder's of a sequence-to-sequence model.

        Returns:
            Boolean mask over the token dimensions (the shape without `axis`), and the same as row numbers of
            `rows(hidden, axis)`, int64 [N]; both None where every position counts.
        """
        dims = list(hidden.shape)
        del dims[axis]
        key = (tuple(dims), hidden.device, encoder)
        if key not in self._cache:
            mask = self._match(tuple(dims), encoder)
            index = None
            if mask is not None:
                mask = mask.to(hidden.device)
                index = mask.flatten().nonzero().squeeze(1)
                if index.numel() == mask.numel():
                    mask = index = None
            self._cache[key] = mask, index
        return self._cache[key]

    def select(self, chosen: Tensor | None) -> TokenMasks:
        """The masks of the given samples (numbers along the batch dimension) only; None is all of them."""
        if chosen is None:
            return self
        part = object.__new__(TokenMasks)
        part._cache, part._virtual, part.matched_given, part.matched = {}, self._virtual, False, False
        for name in ("given", "_labels", "_attention", "_decoder_attention"):
            mask = getattr(self, name)
            if mask is not None and len(mask) <= int(chosen[-1]):
                raise ValueError(
                    "batch_fraction < 1 needs the samples along the first dimension of hidden states and masks: sample "
                    f"{int(chosen[-1])} is not in a mask of shape {list(mask.shape)}. Use batch_fraction=1.0, or "
                    "every=k for a lower cost."
                )
            setattr(part, name, None if mask is None else mask.index_select(0, chosen.to(mask.device)))
        return part

    def leave_something_out(self) -> bool:
        """Whether a mask over tokens is there and does not count all of them. Waits for the device."""
        masks = (self._labels, self._decoder_attention, self._attention)
        return any(mask is not None and mask.dim() == 2 and not bool(mask.all()) for mask in masks)

    def _match(self, dims: tuple[int, ...], encoder: bool) -> Tensor | None:
        # The encoder of a sequence-to-sequence model sees the prompt: the labels are the decoder's tokens.
        own = [(self._decoder_attention, True), (self._attention, True)]
        own = own[1:] if encoder else [(self._labels, False), *own]
        masks = [(mask, counted) for mask, counted in ((self.given, False), *own) if mask is not None]
        # Asking for virtual tokens is a walk over all modules, so it is done only where the masks alone do not fit.
        for virtual_tokens in (_none, self._virtual) if masks else ():
            virtual = virtual_tokens()
            for candidate, counted in masks:
                if (fitted := _fit(_prepended(candidate, virtual, counted), dims)) is None:
                    continue
                self.matched = True
                self.matched_given = self.matched_given or candidate is self.given
                return fitted
        return None


def _none() -> int:
    return 0


def _prepended(mask: Tensor, virtual: int, counted: bool) -> Tensor:
    """`mask` [batch, tokens] with `virtual` more tokens in front, which all count or do not."""
    if not virtual or mask.dim() != 2:
        return mask
    return torch.cat([mask.new_full((len(mask), virtual), counted), mask], 1)


def _fit(mask: Tensor, dims: tuple[int, ...]) -> Tensor | None:
    """`mask` laid over token dimensions `dims`, or None where the shapes do not belong together."""
    shape = tuple(mask.shape)
    if shape == dims:
        return mask
    if len(shape) == 2:
        if dims == shape[::-1]:  # time first
            return mask.t()
        if len(dims) > 2 and dims[:2] == shape:  # [batch, tokens, streams]
            return mask.reshape(*shape, *[1] * (len(dims) - 2)).expand(dims)
        if len(dims) > 2 and dims[-2:] == shape:  # [streams, batch, tokens]
            return mask.expand(dims)
        if len(dims) <= 2 and _numel(dims) == mask.numel() and 1 in (len(dims), *dims):  # flattened or packed
            return mask.reshape(dims)
    return None


def _numel(dims: tuple[int, ...]) -> int:
    return int(torch.Size(dims).numel())


def _entry(batch: Any, name: str) -> Tensor | None:
    value = batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)
    return value if isinstance(value, Tensor) else None


def _is_integer(labels: Tensor) -> bool:
    return not labels.is_floating_point() and labels.dtype != torch.bool


def _binary(mask: Tensor | None) -> Tensor | None:
    # 4-D masks are additive attention biases over pairs of tokens, not masks over tokens.
    return mask != 0 if mask is not None and mask.dim() <= 2 else None
