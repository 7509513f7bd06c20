"""What is measured on a fine-tuned model: the eleven tasks, prompt variations, hidden states under noise."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from demo.skills import Example
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedTokenizerBase

from paper.data import batch_of
from paper.local_tasks import coqa_of_the_hub, gsm8k_of_the_hub, is_there, local_task
from paper.settings import Protocol
from paper.tasks import HARNESS, by_category, main_figure

# Five ways to ask for the same answer (Figure 5; the paper's own wordings are in its appendix, these are ours).
VARIATIONS = (
    "Question: {{question}}\nAnswer:",
    "Q: {{question}}\nA:",
    "Solve this problem.\n{{question}}\nSolution:",
    "### Instruction:\n{{question}}\n\n### Response:\n",
    "Problem: {{question}}\nAnswer:",
)
# Figure 6: NEFTune's strength, and how many texts of the training set (the paper does not say which ones).
NOISE, TEXTS = 5.0, 200


@dataclass(frozen=True)
class Questions:
    """What to ask.

    Attributes:
        names: of the tasks.
        folder: of local data; None for the hub.
        limit: most questions a task; None for all.
        batch_size: of the evaluation.
        longest: most tokens of an answer that the model writes.
    """

    names: list[str]
    folder: Path | None
    limit: int | None
    batch_size: int = 8
    longest: int = 256


@cache
def _task_manager(own_tasks: bool) -> Any:
    """Reading the harness's own thousands of tasks takes seconds, and local ones do not need them."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=own_tasks)


def _results(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tasks: list[Any], ask: Questions
) -> dict[str, dict[str, Any]]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("The evaluation needs lm-evaluation-harness: pip install 'lfu_reg[paper]'") from error
    # The harness's own models compute in the dtype of their weights, so these do, too.
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=ask.batch_size)
    said = simple_evaluate(
        lm,
        tasks=tasks,
        task_manager=_task_manager(own_tasks=ask.folder is None),
        limit=ask.limit,
        bootstrap_iters=0,
        log_samples=False,
        gen_kwargs={"max_gen_toks": ask.longest},
        verbosity="ERROR",
    )
    # Under torchrun every process asks all questions, as they share one sharded model; the first one gets the answer.
    shared = [dict(said["results"]) if said else None]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    results: dict[str, dict[str, Any]] = shared[0]  # type: ignore[assignment]
    return results


def eleven_tasks(model: nn.Module, tokenizer: PreTrainedTokenizerBase, ask: Questions) -> dict[str, float]:
    """Percent by task and by category; tasks without local data are left out.

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        ask: what.
    """
    parts = [(name, part) for name in ask.names for part in HARNESS[name]]
    if ask.folder is None:
        tasks: list[Any] = [coqa_of_the_hub() if part == "coqa" else part for _, part in parts]
    else:
        parts = [(name, part) for name, part in parts if is_there(part, ask.folder)]
        tasks = [local_task(part, ask.folder, ask.limit) for _, part in parts]
    results = _results(model, tokenizer, tasks, ask)
    by_task: dict[str, list[float]] = {}
    for name, part in parts:
        by_task.setdefault(name, []).append(main_figure(results[part]))
    figures = {name: statistics.fmean(values) for name, values in by_task.items()}
    return {**figures, **by_category(figures)}


def prompt_variations(model: nn.Module, tokenizer: PreTrainedTokenizerBase, ask: Questions) -> dict[str, float]:
    """GSM8K accuracy in percent over ways to ask: mean and standard deviation."""
    source = gsm8k_of_the_hub() if ask.folder is None else local_task("gsm8k", ask.folder, ask.limit)
    tasks = [{**source, "task": f"variation_{i}", "doc_to_text": text} for i, text in enumerate(VARIATIONS)]
    results = _results(model, tokenizer, tasks, ask)
    values = [main_figure(results[task["task"]]) for task in tasks]
    return {
        **{f"variation_{i}": v for i, v in enumerate(values)},
        "mean": statistics.fmean(values),
        "sd": statistics.pstdev(values),
    }


@torch.no_grad()
def similarity_under_noise(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    protocol: Protocol,
    noise: float = NOISE,
    batch_size: int = 4,
) -> dict[str, float]:
    """Cosine similarity of hidden states between clean and noisy embeddings, by layer and as their mean (Figure 6).

    Args:
        model: in eval mode.
        tokenizer: its tokenizer.
        examples: texts.
        protocol: their template and length.
        noise: standard deviation of the Gaussian noise, times the root of (tokens x hidden size).
        batch_size: of the forward passes.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(protocol.seed)

    def noisy(module: nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        length, width = embedded.shape[-2:]
        drawn = torch.randn(embedded.shape, generator=generator).to(embedded)
        return embedded + drawn * (noise / (length * width) ** 0.5)

    sums, tokens = None, 0
    for start in range(0, len(examples), batch_size):
        batch = batch_of(examples[start : start + batch_size], tokenizer, protocol, device)
        mask = batch["attention_mask"].bool()
        inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "use_cache": False}
        clean = model(**inputs, output_hidden_states=True).hidden_states
        handle = model.get_input_embeddings().register_forward_hook(noisy)
        try:
            moved = model(**inputs, output_hidden_states=True).hidden_states
        finally:
            handle.remove()
        cosines = [
            cosine_similarity(a.float(), b.float(), dim=-1)[mask].sum() for a, b in zip(clean, moved, strict=True)
        ]
        sums, tokens = torch.stack(cosines) + (0 if sums is None else sums), tokens + int(mask.sum())
    values = (sums / tokens).tolist()
    return {**{f"layer_{i}": v for i, v in enumerate(values)}, "mean": statistics.fmean(values)}
