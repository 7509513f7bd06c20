"""The loss function and what it returns: refused where no gradients can be taken of it, with the cure."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb

import torch
from torch import Tensor, nn

from lfu_reg.distributed.tensor_parallel import whole
from lfu_reg.hooks.early_exit import call_loss_function
from lfu_reg.model.names import shown

CALL = "The call is reg(model, batch, sft_loss_fn), since LfU runs the model itself, by sft_loss_fn(model, batch)."
NOTHING_TRAINABLE = (
    "sft_loss_fn returned a loss that depends on no trainable parameter (requires_grad is False). Do not detach it, "
    "make a new tensor of it or compute it under torch.no_grad(). Reentrant checkpoints cut the graph where no input "
    "requires a gradient: use_reentrant=False."
)
ALL_FROZEN = (
    "All {number} parameters of {model} are frozen (requires_grad is False), so there is nothing to train. Unfreeze "
    "some with requires_grad_(True), or put adapters on the model before the first step (get_peft_model; a loaded "
    "adapter needs is_trainable=True)."
)
FREED = (
    "A graph that the step goes back through is freed already. Leave backward(), optimizer.step() and zero_grad() out "
    "of sft_loss_fn: it returns the loss, and the loop calls backward() on what the regularizer returns. A gradient "
    "that the loss itself needs: pass retain_graph=True there, or run that forward of the model under torch.no_grad() "
    "or outside of sft_loss_fn. Tensors that an earlier step computed: detach() them."
)
CRITERIA = ("torch.nn.functional", "torch.nn.modules.loss")


def check_loss_function(function: object, model: object) -> None:
    """Raise unless it can be called, which a loss cannot, with a model and a batch, which a criterion cannot."""
    if not callable(function):
        what = f"a {type(function).__name__}, and no function of (model, batch) that returns the loss"
    elif function is model or str(getattr(function, "__module__", "")).startswith(CRITERIA):
        what = f"{getattr(function, '__name__', type(function).__name__)}; write a function that calls the model and it"
    else:
        return
    raise TypeError(f"sft_loss_fn is {what}. {CALL}")


@contextmanager
def errors_explained() -> Iterator[None]:
    """Add the cure to the errors of a function of other arguments, and of one that calls backward() itself."""
    try:
        yield
    except TypeError as error:
        *_, (frame, _) = walk_tb(error.__traceback__)
        if frame.f_code is call_loss_function.__code__:  # of the call, and not from inside of the function
            raise TypeError(
                f"sft_loss_fn has to take (model, batch): {error}. Write `lambda model, batch: ...` around it. {CALL}"
            ) from error
        raise
    except RuntimeError as error:
        if "through the graph a second time" in str(error):
            raise RuntimeError(FREED) from error
        raise


def check_loss(loss: object, model: nn.Module, *, first: bool) -> Tensor:
    """The SFT loss, if gradients can be taken of it."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"sft_loss_fn returned a {type(loss).__name__}; it has to return a scalar tensor.{_what_to_return(loss)}"
        )
    if loss.dim() != 0 or loss.is_complex():
        raise ValueError(
            f"sft_loss_fn returned a tensor of shape {list(loss.shape)} and dtype {loss.dtype}; it has to return a "
            "real scalar: reduce it with .mean() or .sum(), or compute the loss where these are the model's outputs."
        )
    if not loss.requires_grad:
        raise nothing_trainable(model)
    # It waits for the device; in later steps that is the loop's business, so that a GradScaler sees it and skips.
    if first and not torch.isfinite(loss.detach()):
        raise ValueError(
            f"sft_loss_fn returned {float(loss.detach())} at the first step. Check the data (a batch without any label "
            "gives NaN), the learning rate and the dtype: no direction can be taken from such a loss."
        )
    return whole(loss)


def nothing_trainable(model: nn.Module) -> ValueError:
    """What to say of a loss that trains nothing."""
    trained = [p.requires_grad for p in model.parameters()]
    return ValueError(
        NOTHING_TRAINABLE if any(trained) else ALL_FROZEN.format(number=len(trained), model=type(model).__name__)
    )


def _what_to_return(returned: object) -> str:
    """The cure as a sentence; empty where none is sure."""
    besides = " What the loop needs besides, store from inside of the function while reg.is_second_pass is False."
    if returned is None:
        return " Let it end with `return loss`, without backward(); a model's loss is None where it gets no labels."
    if hasattr(returned, "loss"):
        if returned.loss is None:
            return " Its loss is None, as models give it without labels: put labels into the batch that the model gets."
        return f" Return outputs.loss instead of outputs.{besides}"
    if isinstance(returned, Mapping):
        entry = "out['loss']" if "loss" in returned else f"its entry that is the loss, of {shown(list(returned))},"
        return f" Return {entry} instead.{besides}"
    if isinstance(returned, (tuple, list)):
        scalars = [i for i, entry in enumerate(returned) if isinstance(entry, Tensor) and entry.dim() == 0]
        return f" Return the loss alone{f', its element {scalars[0]}' if scalars else ''}.{besides}"
    if isinstance(returned, numbers.Number) or hasattr(returned, "item"):
        return " Return the tensor itself, without .item(), float() or .numpy(): gradients are taken of it."
    if inspect.iscoroutine(returned) or inspect.isgenerator(returned):
        return " Write an ordinary function, without async and yield."
    return ""
