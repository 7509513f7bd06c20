"""What the published code does differently from the text or from plain habits: every switch has its effect."""

from __future__ import annotations

from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from demo.skills import Example
from methods.base import IGNORED
from paper import train
from paper.data import alpaca, batch_of, encoded, micro_batches, second_loader, updates
from paper.published_lora import PublishedLoRA
from paper.published_steering import PublishedSteering
from paper.settings import PROTOCOLS, Model, Protocol
from paper.states import collected, names_of, numbers_of
from paper.tables import IM, LFU, METHODS, SFT, TABLE_6, Row
from paper.train import FromRegularizer, Place, adapted, finetune, method_of, micro_loss, token_loss
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lfu_reg import LoRADeltas, SteeringVectors, WeightDeltas
from tests.support.architectures import VOCAB, llama
from tests.support.cases import seeded, token_batch

SMALL = str(Path(__file__).resolve().parents[2] / "benchmarks" / "demo" / "model")
HERE = Place(0, 1, torch.device("cpu"))
MINE = Model("", "mine", alpha=0.1, lam=5.0)
REPS = Row("LfU RepS", "lfu-steering")
PUBLISHED, TEXT = PROTOCOLS["published"], PROTOCOLS["text"]
EXACT = replace(PUBLISHED, checkpointing="exact")
Batch = dict[str, Tensor]


def make() -> nn.Module:
    """A tiny Llama with a LoRA adapter that has left its starting point, in float64."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(seeded(llama), config).double()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model.train()


def batch(seed: int = 2, shape: tuple[int, int] = (3, 7)) -> Batch:
    return token_batch(seed, vocab=VOCAB, shape=shape)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(trained(model).values())))


def same(left: list[Tensor], right: list[Tensor]) -> None:
    assert sum(float(g.norm()) for g in left) > 0
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SMALL)


def examples(count: int) -> list[Example]:
    return [alpaca(f"Add {i} and {i}.", str(2 * i) * (1 + i % 5)) for i in range(count)]


# ---------------------------------------------------------------------- data


def test_template() -> None:
    plain = alpaca("Do it.", "Done.")
    assert plain.prompt.startswith("Below is an instruction that describes a task. Write")
    assert plain.prompt.endswith("### Instruction:\nDo it.\n\n### Response:\n")
    assert alpaca("Do it.", "Done.", "this").prompt.endswith("### Instruction:\nDo it.\nthis\n\n### Response:\n")
    assert "### Input:\nthis\n" in alpaca("Do it.", "Done.", "this", section=True).prompt


def test_newlines_after_the_end_are_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    example, newlines = alpaca("Do it.", "Done."), tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    after = encoded(tokenizer, example, PUBLISHED)
    assert after["labels"][-len(newlines) - 1 :] == [tokenizer.eos_token_id, *newlines]
    assert after["input_ids"][-len(newlines) :] == newlines
    assert encoded(tokenizer, example, replace(PUBLISHED, newlines=False))["labels"][-1] == tokenizer.eos_token_id


def test_length(tokenizer: PreTrainedTokenizerBase) -> None:
    long = Example("p" * 3000, "r" * 3000)
    assert len(encoded(tokenizer, long, PUBLISHED)["input_ids"]) == 2048
    assert len(encoded(tokenizer, long, replace(PUBLISHED, max_length=1024))["input_ids"]) == 1024


def test_padding_to_multiples(tokenizer: PreTrainedTokenizerBase) -> None:
    widths = {}
    for multiple in (1, 8):
        padded = batch_of(examples(3), tokenizer, replace(PUBLISHED, pad_to=multiple), HERE.device)
        widths[multiple] = padded["input_ids"].shape[1]
        assert padded["labels"].shape == padded["input_ids"].shape == padded["attention_mask"].shape
        assert (padded["labels"][padded["attention_mask"] == 0] == IGNORED).all()
        assert int(padded["attention_mask"].sum()) == sum(
            len(encoded(tokenizer, e, PUBLISHED)["input_ids"]) for e in examples(3)
        )
    assert widths[8] % 8 == 0
    assert widths[8] - widths[1] in range(8)
    assert widths[1] % 8


def test_last_batches() -> None:
    # 4 x 4 + 4 + 3 samples in an epoch.
    kept = updates(micro_batches(23, PUBLISHED, "epoch 0"), PUBLISHED)
    assert [[len(b) for b in step] for step in kept] == [[4, 4, 4, 4], [4, 3]]
    assert sorted(i for step in kept for b in step for i in b) == list(range(23))
    dropping = replace(PUBLISHED, keep_last=False)
    assert [[len(b) for b in step] for step in updates(micro_batches(23, dropping, "epoch 0"), dropping)] == [[4] * 4]


def test_every_process_gets_as_many_batches() -> None:
    shares = [micro_batches(10, PUBLISHED, "epoch 0", rank, 4) for rank in range(4)]
    assert {tuple(map(len, share)) for share in shares} == {(3,)}
    assert {i for share in shares for b in share for i in b} == set(range(10))
    first, second = (updates(micro_batches(10, PUBLISHED, draw), PUBLISHED) for draw in ("epoch 0", "epoch 1"))
    assert first != second
    assert micro_batches(10, PUBLISHED, "x") != micro_batches(10, replace(PUBLISHED, seed=43), "x")


def test_the_second_loader_sees_the_same_data_in_its_own_order(tokenizer: PreTrainedTokenizerBase) -> None:
    protocol = replace(PUBLISHED, batch_size=2)
    own = [batch_of([examples(4)[i] for i in b], tokenizer, protocol, HERE.device)
           for b in micro_batches(4, protocol, "epoch 0")]  # fmt: skip
    loader = second_loader(examples(4), tokenizer, protocol, HERE.device)
    other = [next(loader) for _ in range(4)]

    def rows(batches: list[Batch]) -> list[str]:
        return [t for b in batches for t in tokenizer.batch_decode(b["input_ids"], skip_special_tokens=True)]

    assert rows(other[:2]) != rows(own)
    assert sorted(rows(other[:2])) == sorted(rows(other[2:])) == sorted(rows(own))


# ---------------------------------------------------------------------- the loss of an update


@pytest.mark.parametrize("token_mean", [True, False])
@pytest.mark.parametrize("row", [SFT, IM, Row("GEM", "gem", {"beta": 0.7})])
def test_token_mean_over_the_update(row: Row, token_mean: bool) -> None:
    model, parts = make(), [batch(2), batch(3, (2, 5))]
    method = method_of(row, model, MINE, PUBLISHED, repeat(batch()))
    counts = [train.counted(row, b) for b in parts]
    assert counts[0] != counts[1]
    mean = sum(counts) / 2 if token_mean else None
    total = sum(micro_loss(method, row, b, mean) for b in parts) / 2
    alone = [micro_loss(method, row, b, None) for b in parts]
    weights = [n / sum(counts) for n in counts] if token_mean else [0.5, 0.5]
    expected = sum(w * loss for w, loss in zip(weights, alone, strict=True))
    same(gradients(total, model), gradients(expected, model))


def test_what_lfu_adds_weighs_the_same_in_every_micro_batch() -> None:
    model, protocol = make(), replace(TEXT, seed=1)
    losses: dict[float, list[float]] = {}
    for lam in (0.0, 5.0):
        for mean_tokens in (5.0, 50.0):
            method = method_of(replace(LFU, settings={"lam": lam}), model, MINE, protocol, repeat(batch()))
            losses.setdefault(lam, []).append(float(micro_loss(method, LFU, batch(), mean_tokens).detach()))
            method.finish()
    added = [with_it - without for with_it, without in zip(losses[5.0], losses[0.0], strict=True)]
    assert added[0] == pytest.approx(added[1], rel=1e-6)
    assert losses[0.0][0] == pytest.approx(10 * losses[0.0][1])


def test_the_loss_function_can_be_called_again() -> None:
    model = make()
    first, second = (token_loss(model, batch(), 7.0).detach() for _ in range(2))
    assert torch.equal(first, second)


def test_clipping(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any) -> Any:
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack(grads).norm()))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for clip in (0.01, 0.0):
        protocol = replace(PUBLISHED, batch_size=1, accumulate=1, clip=clip)
        model = adapted(SMALL, protocol, HERE, torch.float32)
        finetune(model, tokenizer, examples(1), SFT, MINE, protocol, HERE, max_steps=1)
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert norms[1] > 0.05
    assert Protocol().clip == 1.0


def test_a_run_trains_and_times_its_steps(tokenizer: PreTrainedTokenizerBase) -> None:
    protocol = replace(PUBLISHED, batch_size=2, accumulate=2, lr=1e-2, max_length=250)
    model = adapted(SMALL, protocol, HERE, torch.float32)
    figures = finetune(model, tokenizer, examples(5), SFT, MINE, protocol, HERE)
    assert figures["steps"] == 6  # two an epoch: four samples and one
    assert figures["final_loss"] < figures["first_loss"]
    assert figures["ms_per_step"] > 0
    dropping = replace(protocol, keep_last=False, accumulate=4)
    with pytest.raises(ValueError, match="5 training examples; one optimizer step takes 8"):
        finetune(model, tokenizer, examples(5), SFT, MINE, dropping, HERE)


# ---------------------------------------------------------------------- adapters and states


@pytest.mark.parametrize("float32", [True, False])
def test_adapters_on_a_base_in_bfloat16(float32: bool) -> None:
    model = adapted(SMALL, replace(PUBLISHED, float32_adapters=float32), HERE, torch.bfloat16)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32 if float32 else torch.bfloat16)}
    assert {name.split(".")[-3] for name in trained(model)} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("row", [*METHODS, REPS, *TABLE_6.values()], ids=lambda row: row.label)
def test_checkpointing_changes_no_result_but_the_published_lfu(row: Row, tokenizer: PreTrainedTokenizerBase) -> None:
    found = {}
    for checkpointing in get_args(get_type_hints(Protocol)["checkpointing"]):
        protocol = replace(PUBLISHED, checkpointing=checkpointing)
        model = adapted(SMALL, protocol, HERE, torch.float32).double()
        assert model.is_gradient_checkpointing == (checkpointing != "off")
        both = [batch_of(examples(4)[i : i + 2], tokenizer, protocol, HERE.device) for i in (0, 2)]
        method = method_of(row, model, MINE, protocol, repeat(both[1]))
        torch.manual_seed(0)
        method(model, both[0], token_loss).backward()
        method.finish()
        found[checkpointing] = [p.grad for p in trained(model).values() if p.grad is not None]
    same(found["exact"], found["off"])
    if row != LFU:
        same(found["unmoved"], found["off"])
    else:
        assert any((a - b).norm() > 0.01 * b.norm() for a, b in zip(found["unmoved"], found["off"], strict=True))


def test_what_several_processes_cannot_do() -> None:
    two = Place(0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="float32_adapters=false"):
        adapted(SMALL, replace(PUBLISHED, checkpointing="exact"), two, torch.bfloat16)
    with pytest.raises(ValueError, match="checkpointing=exact"):
        adapted(SMALL, PUBLISHED, two, torch.float32)


def test_layer_groups_of_table_5b() -> None:
    groups = [numbers_of(part, 32) for part in ("early", "middle", "late")]
    assert [(group[0], group[-1]) for group in groups] == [(1, 11), (12, 22), (23, 32)]
    assert [numbers_of(part, 4) for part in ("early", "middle", "late")] == [[1, 2], [3], [4]]


def test_the_states_are_those_of_output_hidden_states() -> None:
    model, seen = make(), []
    names = names_of(model, "hidden-states")
    blocks = names_of(model, "blocks")
    assert len(names) == len(blocks) + 1
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out: seen.append(out if isinstance(out, Tensor) else out[0])
        )
    told = model(**batch(), output_hidden_states=True).hidden_states
    assert len(told) == len(seen)
    assert all(torch.equal(a, b) for a, b in zip(told, seen, strict=True))
    assert names_of(model, "hidden-states", "early") == names_of(model, "blocks", "early")
    assert names_of(model, "hidden-states", "late")[-1].endswith("norm")
    assert names_of(model, "blocks", "late")[-1] == blocks[-1]


# ---------------------------------------------------------------------- LfU's rows


def test_the_readings_of_lfu() -> None:
    model = make()
    published = method_of(LFU, model, MINE, PUBLISHED, repeat(batch()))
    assert isinstance(published, PublishedLoRA)
    assert published.others is not None
    assert len(published.modules) == len(names_of(model, "blocks")) + 1
    exact = method_of(LFU, model, MINE, EXACT, repeat(batch()))
    assert isinstance(exact, FromRegularizer)
    assert isinstance(exact.reg.auxiliary, WeightDeltas)
    assert exact.others is not None
    assert len(exact.reg.layers) == len(published.modules)
    exact.finish()
    text = method_of(LFU, model, MINE, TEXT, repeat(batch()))
    assert isinstance(text, FromRegularizer)
    assert isinstance(text.reg.auxiliary, LoRADeltas)
    assert text.others is None
    assert list(text.reg.layers) == names_of(model, "blocks")
    text.finish()
    assert isinstance(method_of(REPS, model, MINE, PUBLISHED, repeat(batch())), PublishedSteering)
    steering = method_of(REPS, model, MINE, TEXT, repeat(batch()))
    assert isinstance(steering, FromRegularizer)
    assert isinstance(steering.reg.auxiliary, SteeringVectors)
    steering.finish()


def hidden_states(model: nn.Module, weights: dict[str, Tensor], own: Batch) -> Any:
    inputs = {"input_ids": own["input_ids"], "attention_mask": own["attention_mask"], "output_hidden_states": True}
    return torch.func.functional_call(model, weights, (), inputs).hidden_states


def moved_weights(model: nn.Module, other: Batch) -> dict[str, Tensor]:
    g = gradients(token_loss(model, other), model)
    length = torch.stack([x.norm() for x in g]).norm()
    return {name: p + 0.1 * x / length for (name, p), x in zip(trained(model).items(), g, strict=True)}


def lfu_loss(model: nn.Module, own: Batch, perturbed: Any) -> Tensor:
    mask = own["labels"] != IGNORED
    terms = [
        (a.detach()[mask] - b[mask]).square().mean()
        for a, b in zip(hidden_states(model, {}, own), perturbed, strict=True)
    ]
    return token_loss(model, own) + 5.0 * torch.stack(terms).mean()


@pytest.mark.parametrize("direction", ["second-loader", "own-batch"])
def test_the_lora_step_by_hand(direction: Any) -> None:
    model, own, other = make(), batch(2), batch(9, (2, 6))
    method = method_of(LFU, model, MINE, replace(EXACT, direction=direction), repeat(other))
    loss = method(model, own, token_loss)
    found = gradients(loss, model)
    method.finish()
    moved = moved_weights(model, other if direction == "second-loader" else own)
    expected = lfu_loss(model, own, hidden_states(model, moved, own))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    same(found, gradients(expected, model))


@pytest.mark.parametrize("direction", ["second-loader", "own-batch"])
def test_the_published_lora_step_by_hand(direction: Any) -> None:
    model, own, other = make(), batch(2), batch(9, (2, 6))
    moved = moved_weights(model, other if direction == "second-loader" else own)
    with torch.no_grad():
        names = names_of(model, "blocks")
        with collected([model.get_submodule(name) for name in names]) as values:
            hidden_states(model, moved, own)

    def at(value: Tensor) -> Any:
        # The moved weights' value, and the way back through the weights as they are.
        return lambda m, args, out: out + (value - out).detach()

    handles = [model.get_submodule(n).register_forward_hook(at(v)) for n, v in zip(names, values, strict=True)]
    with collected([model.get_submodule(name) for name in names_of(model, "hidden-states")]) as perturbed:
        hidden_states(model, {}, own)
    for handle in handles:
        handle.remove()
    expected = lfu_loss(model, own, perturbed)
    gradients_expected = gradients(expected, model)

    before = [p.detach().clone() for p in trained(model).values()]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    method = method_of(LFU, model, MINE, replace(PUBLISHED, direction=direction), repeat(other))
    loss = method(model, own, token_loss)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    same(gradients(loss, model), gradients_expected)
    assert all(torch.equal(p, start) for p, start in zip(trained(model).values(), before, strict=True))


def test_the_published_lora_step_moves_adapters_under_autocast() -> None:
    model, own = make().float(), batch(2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    method = method_of(LFU, model, MINE, PUBLISHED, repeat(own))
    with torch.autocast("cpu", torch.bfloat16):
        plain, loss = float(token_loss(model, own).detach()), float(method(model, own, token_loss).detach())
    assert loss > plain + 1e-6  # casts of the weights that were kept would leave no distance


def test_sam_is_the_loss_at_the_moved_weights() -> None:
    model, own = make(), batch()
    method = method_of(Row("SAM", "sam"), model, MINE, PUBLISHED, repeat(own))
    g = gradients(token_loss(model, own), model)
    length = torch.stack([x.norm() for x in g]).norm()
    moved = {name: p + 0.1 * x / length for (name, p), x in zip(trained(model).items(), g, strict=True)}
    logits = torch.func.functional_call(model, moved, (), {k: own[k] for k in ("input_ids", "attention_mask")}).logits
    labels = own["labels"][:, 1:].flatten()
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED)
    assert float(method(model, own, token_loss).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


# ---------------------------------------------------------------------- the published steering procedure


def steered(model: nn.Module, other: Batch, **settings: Any) -> PublishedSteering:
    return PublishedSteering(model, repeat(other), names_of(model, "hidden-states"), **settings)


def test_published_steering_by_hand() -> None:
    model, own, other = make(), batch(2), batch(9, (2, 6))
    method = steered(model, other, alpha=0.1, lam=0.5, lr=0.0)
    loss = method(model, own, token_loss)
    found = gradients(loss, model)

    vectors = [v.detach() / v.detach().norm() for v in method.vectors]
    blocks = [model.get_submodule(name) for name in names_of(model, "blocks")]
    fixed: list[Tensor] = []

    def turn(vector: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            h = output if isinstance(output, Tensor) else output[0]
            turned = nn.functional.normalize(nn.functional.normalize(h, dim=-1) + 0.1 * vector, dim=-1)
            turned = turned * h.norm(dim=-1, keepdim=True)
            return turned if isinstance(output, Tensor) else (turned, *output[1:])

        return hook

    handles = [b.register_forward_hook(turn(v)) for b, v in zip(blocks, vectors, strict=True)]
    with torch.no_grad():
        inputs = {k: other[k] for k in ("input_ids", "attention_mask")}
        fixed = list(model.eval()(**inputs, output_hidden_states=True).hidden_states)
    for handle in handles:
        handle.remove()
    clean = model.train()(
        input_ids=own["input_ids"], attention_mask=own["attention_mask"], output_hidden_states=True
    ).hidden_states
    mask = own["labels"][:2, :6] != IGNORED  # both batches have two samples and six positions
    terms = [(a[:2, :6][mask] - b[mask]).square().mean() for a, b in zip(clean, fixed, strict=True)]
    expected = token_loss(model, own) + 0.5 * torch.stack(terms).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    same(found, gradients(expected, model))


def test_published_steering_is_not_equation_5() -> None:
    model, own, other = make(), batch(2), batch(9)
    plain = float(token_loss(model, own))
    # Eq. 5 is zero where nothing is perturbed. Here that holds only if the other batch is this one.
    assert float(steered(model, own, alpha=0.0)(model, own, token_loss)) == pytest.approx(plain, rel=1e-12)
    assert float(steered(model, other, alpha=0.0)(model, own, token_loss)) > plain * (1 + 1e-6)


def test_published_vectors_move_in_float32_and_not_in_bfloat16() -> None:
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make().to(dtype)
        method = steered(model, batch(9), lr=1e-4)
        before = torch.stack([v.detach().clone() for v in method.vectors]).float()
        for _ in range(3):
            method(model, batch(), token_loss)
        after = torch.stack([v.detach() for v in method.vectors]).float()
        moved[dtype] = float((before != after).float().mean())
        assert float((before - after).abs().max()) < 1e-3
    assert moved[torch.float32] > 0.95
    assert moved[torch.bfloat16] < 0.1


def test_a_single_sample_is_broadcast_and_train_mode_comes_back() -> None:
    model, own = make(), batch(2)
    one = {name: value[:1] for name, value in batch(9).items()}
    with_one = float(steered(model, one, lam=1.0)(model, own, token_loss))
    threefold = {name: value.expand(3, -1) for name, value in one.items()}
    assert with_one == pytest.approx(float(steered(model, threefold, lam=1.0)(model, own, token_loss)), rel=1e-9)
    assert model.training
