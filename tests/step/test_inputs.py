"""Batches as users have them: padded on either side, packed, of changing shape, in any container, with caches."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lfu_reg import LfURegularizer
from tests.support.architectures import VOCAB, WIDTH
from tests.support.cases import Case, next_token_loss
from tests.support.compare import assert_same_gradients, close, gradients_of
from tests.support.harness import auxiliary, run_pair
from tests.support.models import FROZEN, LLAMA, MIXTRAL, llm_batch
from tests.support.oracle_parts import hidden_of
from tests.support.refusals import says

AUXILIARIES = ("lora", "steering", "weights")
FINDS_PACKED_ROWS = importlib.util.find_spec("transformers.masking_utils") is not None


def outcome(model: nn.Module, name: str, batch: Any, loss: Any = LLAMA.loss, **options: Any) -> tuple[float, Any]:
    with LfURegularizer(model, auxiliary(name), **{"alpha": 0.05, "lam": 0.7, "seed": 3, **options}) as reg:
        value = reg(model, batch, loss)
        value.backward()
    return float(value.detach()), gradients_of(model)


def same(left: tuple[float, Any], right: tuple[float, Any], tolerance: float = 1e-9) -> None:
    close(left[0], right[0], tolerance)
    assert_same_gradients(left[1], right[1], tolerance)


# ------------------------------------------------------------------ padding and packing


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "attention mask"])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_more_padding_on_the_left_changes_nothing(name: str, labelled: bool) -> None:
    def padded(width: int) -> dict[str, Tensor]:
        ids = torch.randint(0, VOCAB, (3, 6), generator=torch.Generator().manual_seed(4))
        attention = torch.ones_like(ids)
        attention[1, :2] = 0
        first_or_padding = attention.cumsum(1) <= 1  # what predicts a first token is padding
        junk = torch.randint(0, VOCAB, (3, width))
        batch = {
            "input_ids": torch.cat([junk, ids], 1),
            "attention_mask": torch.cat([torch.zeros_like(junk), attention], 1),
            "labels": torch.cat([torch.full_like(junk, -100), ids.masked_fill(first_or_padding, -100)], 1),
        }
        return batch if labelled else {key: value for key, value in batch.items() if key != "labels"}

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) <= 1, -100)
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions)
        return next_token_loss(out.logits, labels)

    same(*(outcome(LLAMA.make(), name, padded(width), loss) for width in (1, 5)), tolerance=1e-8)


@pytest.mark.skipif(not FINDS_PACKED_ROWS, reason="an older transformers attends across packed sequences")
@pytest.mark.parametrize("name", AUXILIARIES)
def test_packing_changes_nothing(name: str) -> None:
    """Two sequences in one row, position_ids starting anew, no mask: as the same sequences in two rows."""
    ids = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(4))
    labels = ids.clone()
    labels[:, :2] = -100  # the first token of a sequence is never predicted from the one before it
    rows = {"input_ids": ids, "labels": labels}
    packed = {
        "input_ids": ids.reshape(1, -1),
        "labels": labels.reshape(1, -1),
        "position_ids": torch.arange(6).repeat(2)[None],
    }

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        return next_token_loss(logits, batch["labels"])

    same(outcome(LLAMA.make(), name, packed, loss), outcome(LLAMA.make(), name, rows, loss))


@pytest.mark.parametrize("name", AUXILIARIES)
def test_shapes_that_change_from_step_to_step(name: str) -> None:
    """Every step is that of a fresh regularizer: longer, shorter, a last batch with fewer samples, a single one."""
    model = LLAMA.make()
    reg = LfURegularizer(model, auxiliary(name), alpha=0.05, lam=0.7, seed=3)
    for step, shape in enumerate(((3, 7), (3, 9), (3, 5), (2, 9), (1, 6), (3, 7))):
        model.zero_grad()
        loss = reg(model, llm_batch(step, shape=shape), LLAMA.loss)
        loss.backward()
        twin = LLAMA.make()
        with LfURegularizer(twin, auxiliary(name), alpha=0.05, lam=0.7) as fresh:
            fresh.load_state_dict({"step": step, "seed": 3})
            want = fresh(twin, llm_batch(step, shape=shape), LLAMA.loss)
            want.backward()
        same((float(loss.detach()), gradients_of(model)), (float(want.detach()), gradients_of(twin)), 0.0)


# ------------------------------------------------------------------ containers


@dataclass
class Record:
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class Row(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@pytest.mark.parametrize("kind", [Record, Row])
@pytest.mark.parametrize("fraction", [1.0, 2 / 3])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_batches_with_attributes(name: str, fraction: float, kind: Any) -> None:
    want = outcome(LLAMA.make(), name, llm_batch(), batch_fraction=fraction)
    got = outcome(
        LLAMA.make(), name, kind(**llm_batch()), lambda m, b: LLAMA.loss(m, vars_of(b)), batch_fraction=fraction
    )
    same(got, want, 0.0)


def vars_of(batch: Any) -> dict[str, Tensor]:
    return {key: getattr(batch, key) for key in ("input_ids", "attention_mask", "labels")}


def test_a_tuple_of_padded_tensors_has_no_names_to_go_by() -> None:
    """A token mask of the user's says which tensor it is."""

    def loss(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
        return next_token_loss(model(input_ids=batch[0], attention_mask=batch[1]).logits, batch[2])

    batch = tuple(llm_batch().values())
    got = outcome(LLAMA.make(), "steering", batch, loss, token_mask=lambda b: b[2] != -100)
    same(got, outcome(LLAMA.make(), "steering", llm_batch()))


def test_tuples_without_padding_are_fine() -> None:
    ids = llm_batch()["input_ids"]
    outcome(
        LLAMA.make(), "steering", (ids, torch.ones_like(ids)), lambda m, b: next_token_loss(m(b[0], b[1]).logits, b[0])
    )


def test_a_soft_prompt_outside_of_the_model_with_labels_as_they_were() -> None:
    prompt = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        embedded = model.get_input_embeddings()(batch["input_ids"])
        embedded = torch.cat([prompt.expand(len(embedded), -1, -1), embedded], 1)
        return next_token_loss(model(inputs_embeds=embedded).logits[:, 2:], batch["labels"])

    def mask(batch: Mapping[str, Tensor], layer: str = "") -> Tensor:
        return torch.cat([torch.zeros(3, 2, dtype=torch.bool), batch["labels"] != -100], 1)

    with pytest.warns(match=r"Every position counts.*\[3, 9, 16\].*token_mask"):
        outcome(LLAMA.make(), "steering", llm_batch(), loss)
    prompt.grad = None
    case = Case("", LLAMA.make, llm_batch, loss, mask, LLAMA.layers, LLAMA.linears)
    pair = run_pair(case, "lora", reg_options={"token_mask": mask}, leaves=[prompt])
    pair.check()
    torch.testing.assert_close(prompt.grad, pair.want.leaf_gradients[0], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_inputs_that_are_embeddings(name: str) -> None:
    """A leaf of the user's (adversarial inputs, a data set of embeddings): its gradient has both terms."""
    embedded = torch.randn(3, 7, WIDTH, dtype=torch.float64, requires_grad=True)

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        out = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"])
        return next_token_loss(out.logits, batch["labels"])

    case = Case("", LLAMA.make, llm_batch, loss, LLAMA.mask, LLAMA.layers, LLAMA.linears)
    pair = run_pair(case, name, leaves=[embedded])
    pair.check()
    torch.testing.assert_close(embedded.grad, pair.want.leaf_gradients[0], rtol=1e-9, atol=1e-14)


# ------------------------------------------------------------------ caches


def new_cache(model: Any) -> DynamicCache:
    try:
        return DynamicCache(config=model.config)
    except TypeError:  # before transformers 4.54
        return DynamicCache()


@pytest.mark.parametrize("kind", ["tuple", "object"])
def test_a_cache_in_any_container_is_refused(kind: str) -> None:
    model = LLAMA.make()
    ids, cache = llm_batch()["input_ids"], new_cache(model)
    batch: Any = (ids, cache)
    if kind == "object":
        batch = Record(**llm_batch())
        batch.past_key_values = cache
    with pytest.raises(ValueError, match=says("cache", "use_cache=False")):
        outcome(model, "steering", batch)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", AUXILIARIES)
def test_use_cache(name: str, use_cache: bool) -> None:
    """A cache that the model makes for itself is made anew in pass 2."""

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=use_cache)
        assert (out.past_key_values is None) != use_cache
        return next_token_loss(out.logits, batch["labels"])

    same(outcome(LLAMA.make(), name, llm_batch(), loss), outcome(LLAMA.make(), name, llm_batch()), 0.0)


def test_a_cache_that_the_loss_function_makes() -> None:
    """Each call of the function makes its own, so no pass attends to another one's keys."""
    calls: list[int] = []

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(1)
        cache = new_cache(model)
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], past_key_values=cache)
        return next_token_loss(out.logits, batch["labels"])

    same(outcome(LLAMA.make(), "lora", llm_batch(), loss), outcome(LLAMA.make(), "lora", llm_batch()), 1e-9)
    assert len(calls) == 2
    # Also at a later step.
    model, plain = LLAMA.make(), LLAMA.make()
    found = []
    for one, second in ((model, loss), (plain, LLAMA.loss)):
        reg = LfURegularizer(one, auxiliary("lora"), alpha=0.05, lam=0.7, seed=3)
        reg(one, llm_batch(), LLAMA.loss)
        value = reg(one, llm_batch(), second)
        value.backward()
        found.append((float(value.detach()), gradients_of(one)))
    same(*found)


# ------------------------------------------------------------------ hidden states in the loss


@pytest.mark.parametrize("strategy", ["released", "retained"])
@pytest.mark.parametrize("case", [LLAMA, FROZEN], ids=lambda case: case.name)
@pytest.mark.parametrize("name", AUXILIARIES)
def test_output_hidden_states_in_the_loss(name: str, case: Case, strategy: str) -> None:
    """transformers answers with forward hooks of its own, which it leaves on the blocks: no matter whose came first.

    Frozen lower layers return what requires no gradient, and the regularizer returns something else in its place.
    """

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        # The embeddings' loss has no path to what is trained; those of the blocks have.
        return next_token_loss(out.logits, batch["labels"]) + sum(h.square().mean() for h in out.hidden_states[1:])

    def captured(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The same by hooks of the test's, for the oracle: transformers' come and go with the copies it makes."""
        states: list[Tensor] = []
        root = case.layers[0].rpartition("layers")[0].rstrip(".")
        trunk = model.get_submodule(root)
        handles = [
            module.register_forward_hook(lambda m, a, out: states.append(hidden_of(out)))
            for module in (*trunk.layers[:-1], trunk.norm)
        ]
        try:
            out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        finally:
            for handle in handles:
                handle.remove()
        return next_token_loss(out.logits, batch["labels"]) + sum(h.square().mean() for h in states)

    found = []
    for used_before in (True, False):
        model = case.make()
        if used_before:
            with torch.no_grad():
                loss(model, llm_batch())
        found.append(outcome(model, name, llm_batch(), loss, strategy=strategy))
    same(*found, tolerance=0.0)
    twin = Case("", case.make, llm_batch, captured, case.mask, case.layers, case.linears)
    pair = run_pair(twin, name, reg_options={"strategy": strategy, "seed": 3})
    pair.check()
    same(found[0], (float(pair.loss.detach()), gradients_of(pair.model)))


# ------------------------------------------------------------------ mixture of experts


@pytest.mark.parametrize("name", AUXILIARIES)
def test_the_routers_loss(name: str) -> None:
    """It is part of the SFT loss, and counted once."""

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_router_logits=True,
            use_cache=False,
        )
        return next_token_loss(out.logits, batch["labels"]) + 5.0 * out.aux_loss

    case = Case("", MIXTRAL.make, llm_batch, loss, MIXTRAL.mask, MIXTRAL.layers, MIXTRAL.linears)
    pair = run_pair(case, name, reg_options={"seed": 3})
    pair.check()
    assert not any("experts" in layer for layer in pair.reg.layers)
    checkpointed = case.make()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = outcome(checkpointed, name, llm_batch(), loss)
    same(got, (float(pair.loss.detach()), gradients_of(pair.model)))
