"""Bad input is refused at once: what was given, what is allowed, the cure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lfu_reg.distributed.tensor_parallel import is_distributed
from lfu_reg.model.names import listed
from lfu_reg.model.outputs import is_cache
from lfu_reg.model.tokens import TokenMasks
from lfu_reg.step.loss_checks import CALL

CANNOT_DIVIDE = (
    "batch_fraction < 1 needs inputs whose tensors have the samples along their first dimension, and a model that "
    "neither draws random numbers for each sample (dropout) nor mixes samples (batch norm in training mode): a call on "
    "{number} samples does not give their hidden states. Use batch_fraction=1.0, or every=k for a lower cost."
)
NO_REPLICAS = (
    "torch.nn.DataParallel on several devices runs copies of the model in threads, whose hidden states would mix. Use "
    "DistributedDataParallel with one process per GPU (torchrun), or hide the other GPUs with CUDA_VISIBLE_DEVICES "
    "(transformers' Trainer wraps in DataParallel when it sees several)."
)
WRITTEN = (
    "After these modules had returned, the model wrote in place into the memory of their outputs, by way of another "
    "tensor: {}. Such an output is a view of that tensor, or the tensor under another name. What LfU adds to the "
    "output would be missing there, and the write in the gradients. Let the module return a copy (y.clone()) or write "
    'out of place (x = x * 2 for x.mul_(2)); or use auxiliary="weights", which leaves outputs alone, or other '
    "layers=...."
)
EVERY_POSITION_COUNTS = (
    "Every position counts in the consistency term, padding and prompts too: no mask of the batch fits the hidden "
    "states (shapes {shapes}), not its labels or attention_mask either. Give token_mask=..., a callable of the batch "
    "that returns a mask shaped like the tokens that the layers see."
)
LAZY = (
    "These parameters have no shape yet (torch.nn.Lazy...): {}. Run the model once on a batch, under torch.no_grad(), "
    "before the first step and before the optimizer is made."
)
IN_PARTS = (
    "A chosen layer returned a DTensor, of which every rank holds a part; hidden states are compared as plain tensors, "
    "whole on every rank. Give the last linear map of each layer output_layouts=Replicate() and use_local_output=True "
    "(RowwiseParallel's defaults), or choose other layers with layers=...."
)
SLICES = (
    "Hidden states of the chosen layers differ between ranks that share weights: under tensor parallelism these are "
    "slices (of the sequence, of the batch), and every rank would ascend along the gradient of its own. Let the chosen "
    "layers return whole hidden states, output_layouts=Replicate() in the last linear map (sequence parallelism inside "
    "of a layer is fine); give all ranks of a mesh the same batch, and the same random state for dropout."
)


def check_model(model: object) -> None:
    """Raise unless a regularizer can be attached to `model`."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"model is {given}; allowed is any torch.nn.Module, as an object.")
    for module in model.modules():
        _check_no_replicas(module)


def _check_no_replicas(module: nn.Module) -> None:
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:  # otherwise it calls its module as it is
        raise ValueError(NO_REPLICAS)


def check_no_scripts(layers: Mapping[str, nn.Module]) -> None:
    """Raise if a layer is a program of TorchScript, whose modules are not called in Python."""
    for name, layer in layers.items():
        if any(isinstance(module, torch.jit.ScriptModule) for module in layer.modules()):
            raise ValueError(
                f"Layer {name!r} holds a torch.jit.ScriptModule (script or trace), inside of which no hooks run. "
                "Attach the regularizer to the model as it was before, and use torch.compile for speed."
            )


def check_is_attached(model: object, attached: nn.Module) -> None:
    """Raise unless `model` is or contains the attached module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass the attached module or a wrapper of it. {CALL}")
    for module in model.modules():  # the wrappers come first
        _check_no_replicas(module)
        if module is attached:
            return
    raise ValueError(
        f"This {type(model).__name__} neither is nor contains the {type(attached).__name__} that the regularizer is "
        "attached to. Pass that model or a wrapper of it (PEFT, DDP, compiled), or attach a new LfURegularizer to "
        "this one."
    )


def check_batch(batch: Any) -> None:
    """Raise if the batch holds a key/value cache, which each pass would grow and the next attend to."""
    for key, value in _entries(batch):
        if value is not None and (key in ("past_key_values", "cache_params") or is_cache(value)):
            raise ValueError(
                f"The batch holds a KV cache (its entry {key!r} is a {type(value).__name__}). LfU runs the model twice "
                "on the batch, and the second pass would attend to what the first one added: train without a cache, "
                "use_cache=False."
            )


def _entries(batch: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(batch, Mapping):
        return batch.items()
    if isinstance(batch, (tuple, list)):
        return enumerate(batch)
    return getattr(batch, "__dict__", {}).items()


def check_weights(model: nn.Module) -> None:
    """Raise if weights do not exist yet, or if trained ones are offloaded: these do while their module runs."""
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise ValueError(LAZY.format(listed(lazy, 4)))
    offloaded = [name for name, p in model.named_parameters() if p.requires_grad and p.device.type == "meta"]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} trainable parameters are on the meta device, {offloaded[0]!r} first: offloaded to the "
            "CPU or disk (device_map, cpu_offload, disk_offload), where gradients are lost, with LfU or without. Keep "
            "what is trained on a device: train adapters on resident layers, use a device_map without 'cpu' or 'disk', "
            "or freeze them with requires_grad_(False)."
        )


def check_layers_ran(layers: Collection[str], ran: Collection[str], *, named: bool) -> None:
    """Raise if no chosen layer ran, or if one that was chosen by name or number did not."""
    silent = [name for name in layers if name not in ran]
    if silent and (named or len(silent) == len(layers)):
        raise RuntimeError(
            "These layers returned nothing to the regularizer in the loss's forward pass: "
            f"{listed(silent, 10)}. Either "
            "sft_loss_fn does not run them, or it runs them without gradients (as reentrant checkpoints do: "
            "use_reentrant=False), or they are run as layer.forward(x), which bypasses hooks: call layer(x), or choose "
            "other layers. Or torch.compile ran a graph of another model of the same classes, which has no hooks: set "
            "torch._dynamo.config.skip_nnmodule_hook_guards = False before the models first run, or call "
            "torch.compiler.reset() after attaching."
        )


def check_not_written(names: Iterable[str]) -> None:
    """Raise if the model wrote past our hooks into outputs of the named modules."""
    if written := sorted({repr(name) for name in names}):
        raise RuntimeError(WRITTEN.format(", ".join(written[:5]) + (", ..." if len(written) > 5 else "")))


def check_same_layers(clean: Sequence[str], perturbed: Sequence[str]) -> None:
    """Raise unless both passes ran the same layers in the same order."""
    if list(clean) != list(perturbed):
        raise RuntimeError(
            f"Pass 2 ran other layers than pass 1: {len(perturbed)} hidden states instead of {len(clean)} "
            f"({', '.join(sorted(set(clean) ^ set(perturbed))[:5]) or 'the same layers in another order'}). The "
            "model's control flow depends on something that a second call does not repeat; leave those layers out with "
            "layers=...."
        )


def check_token_mask(tokens: TokenMasks, hidden_states: Sequence[Tensor]) -> None:
    """Raise if hidden states are no plain tensors, or if the user's token mask fitted none."""
    if any(is_distributed(hidden) for hidden in hidden_states):
        raise ValueError(IN_PARTS)
    if tokens.given is not None and not tokens.matched_given:
        shapes = ", ".join(dict.fromkeys(str(list(hidden.shape)) for hidden in hidden_states))
        raise ValueError(
            f"token_mask has shape {list(tokens.given.shape)}, which fits no hidden state (shapes {shapes}). It has to "
            "be shaped like their token dimensions, for example [batch, tokens] for [batch, tokens, hidden]."
        )


def masks_without_effect(tokens: TokenMasks, hidden_states: Sequence[Tensor]) -> str | None:
    """What to warn of if every position counts although a mask says that some do not. Waits for the device."""
    if tokens.matched or not tokens.leave_something_out():
        return None
    shapes = ", ".join(dict.fromkeys(str(list(hidden.shape)) for hidden in hidden_states))
    return EVERY_POSITION_COUNTS.format(shapes=shapes)


def shapes_of_targets(batch: Iterable[Tensor]) -> set[tuple[int, ...]]:
    """Those of two tensors of integers, or of one that is shifted; a classifier may well look at one position only."""
    shapes = Counter(tuple(tensor.shape) for tensor in batch if tensor.dtype in (torch.int64, torch.int32))
    both = {shape for shape, number in shapes.items() if number > 1}
    return both | {(*s[:axis], s[axis] - 1, *s[axis + 1 :]) for s in shapes for axis in range(len(s)) if len(s) == 2}
