"""Which positions of a hidden state count: unpadded response tokens, else unpadded tokens, else all of them.

A hidden state [batch, tokens, hidden] is seen as rows [positions, hidden]. `TokenMasks` is built once per step from the
batch, before the loss function can change it, and answers for the shape of each layer's output which rows count: layers
of one model may differ in layout (time first, flattened, channels first) and in length (encoder and decoder).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TokenMask = Tensor | Callable[[Any], Tensor]

IGNORED_LABEL = -100
COUNTED_BUT_IGNORED = (
    "All positions count in the consistency term although the loss ignores {ignored} of {counted}: the padding, the "
    "prompt or what else its labels leave out. Give ignore_index=..., the label that the loss ignores, or "
    "token_mask=..., a callable of the batch that says which positions count."
)


def rows(hidden: Tensor, axis: int = -1, index: Tensor | None = None) -> Tensor:
    """`hidden` as [positions, hidden], all rows (a view where possible) or those that `index` selects."""
    if axis not in (-1, hidden.dim() - 1):
        hidden = hidden.movedim(axis, -1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat if index is None else flat.index_select(0, index)


class TokenMasks:
    """The masks that a batch offers, matched to hidden states by shape; a `token_mask` overrides them."""

    def __init__(
        self,
        batch: Any,
        token_mask: TokenMask | None = None,
        model: nn.Module | None = None,
        *,
        ignore_index: int = IGNORED_LABEL,
    ) -> None:
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
        # Of a tuple or list, as (inputs, targets), the second entry are the labels if they are integers.
        labels = _entry(batch, "labels")
        self._by_position = labels is None
        if labels is None and isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(batch[1], Tensor):
            labels = batch[1]
        self._labels = _counted_labels(labels, ignore_index)
        self._attention = _unpadded(_entry(batch, "attention_mask"))
        self._decoder_attention = _unpadded(_entry(batch, "decoder_attention_mask"))
        self._model = model
        self._cache: dict[Any, tuple[Tensor | None, Tensor | None]] = {}
        self.matched_given = self.matched = False

    def match(
        self, hidden: Tensor, axis: int, *, encoder: bool, decoder: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """The positions that count as a mask (the shape without `axis`), and as row numbers; None and None for all."""
        dims = list(hidden.shape)
        del dims[axis]
        key = (tuple(dims), hidden.device, encoder, decoder)
        if key not in self._cache:
            mask = self._match(tuple(dims), encoder, decoder)
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
        part = copy.copy(self)
        part._cache, part.matched_given, part.matched = {}, False, False
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

    def _match(self, dims: tuple[int, ...], encoder: bool, decoder: bool) -> Tensor | None:
        # The encoder of a sequence-to-sequence model sees the prompt, which its attention_mask is about; the labels are
        # the decoder's tokens.
        own = [(self._decoder_attention, True), (self._attention, True)]
        padding = own[:1] if decoder or self._decoder_attention is not None else own[1:]
        own = own[1:] if encoder else [(self._labels, False), *own]
        masks = [(mask, counted) for mask, counted in ((self.given, False), *own) if mask is not None]
        # Asking for virtual tokens is a walk over all modules, so it is done only where the masks alone do not fit.
        # They are added as PEFT adds them: attended to, but not a label, nor chosen by the user.
        for prepended in (False, self._model is not None) if masks else ():
            virtual = virtual_tokens(self._model) if prepended and self._model is not None else 0
            for candidate, counted in masks:
                if (fitted := _fit(_prepended(candidate, virtual, counted), dims)) is None:
                    continue
                # The second entry of a tuple that leaves nothing out may be something else, such as an attention mask.
                doubtful = candidate is self._labels and self._by_position and bool(fitted.all())
                self.matched = self.matched or not doubtful
                self.matched_given = self.matched_given or candidate is self.given
                for other, counted in padding if candidate is self._labels else ():
                    if other is not None and (unpadded := _fit(_prepended(other, virtual, counted), dims)) is not None:
                        fitted = fitted & unpadded.to(fitted.device)
                return fitted
        return None


def ignored_but_counted(has_gradient: Tensor) -> tuple[int, int]:
    """How many positions the loss has no gradient at, and how many there are. Waits for the device."""
    # That holds for the hidden state of the last layer, where nothing behind it mixes tokens.
    used = has_gradient.clone()
    # A label at the position itself (labels are not shifted), or that of the next token, predicted from here.
    used[..., 1:] |= has_gradient[..., :-1]
    return int((~used).sum()), used.numel()


def virtual_tokens(model: nn.Module) -> int:
    """How many virtual tokens PEFT may put in front of the batch's own (prompt tuning, P-tuning); 0 without PEFT."""
    # Those of prefix tuning are counted as well, but are keys and values: hidden states are no longer than the batch.
    for module in model.modules():
        if vars(module).get("_is_prompt_learning"):
            config: Any = getattr(module, "active_peft_config", None)
            return int(getattr(config, "num_virtual_tokens", 0) or 0)
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
        if len(dims) <= 2 and math.prod(dims) == mask.numel() and 1 in (len(dims), *dims):  # flattened or packed
            return mask.reshape(dims)
    return None


def _entry(batch: Any, name: str) -> Tensor | None:
    value = batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)
    return value if isinstance(value, Tensor) else None


def _counted_labels(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    if labels is None or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        return None
    labels = labels.long()  # -100 is 156 among unsigned bytes
    counted = torch.ne(labels, IGNORED_LABEL) & torch.ne(labels, ignore_index)
    # Labels of samples, [batch], may be -1 and 1.
    return counted & (labels >= 0) if labels.dim() > 1 else counted


def _unpadded(mask: Tensor | None) -> Tensor | None:
    """Which tokens an attention mask keeps: a boolean one, one of 0 and 1, or an additive one of 0 and -inf."""
    if mask is None or mask.dim() > 2:  # 4-D masks are additive attention biases over pairs of tokens
        return None
    additive = (mask < 0).any()
    if mask.is_floating_point():  # all zeros: an additive mask that keeps everything
        additive = additive | ~(mask != 0).any()
    return torch.where(additive, mask >= 0, mask != 0)
