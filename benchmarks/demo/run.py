"""The experiment: every method on every regime and seed, with the same data, batches and initial adapters."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from demo.measure import Cost, measure_costs
from demo.methods import Method
from demo.task import Evaluation, Task, evaluate
from demo.train import Recipe, finetune, trainable_copy, training_batches


@dataclass(frozen=True)
class Experiment:
    """Everything that determines the results."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    methods: list[Method]
    recipe: Recipe
    seeds: list[int]
    label_noise: list[float]  # one regime for each share of wrong answers

    def before(self) -> Evaluation:
        """The scores of the model as it is."""
        return evaluate(self.task, self.model, self.tokenizer, self.recipe.max_length)

    def runs(self) -> Iterator[dict[str, Any]]:
        """Fine-tunes and scores; yields one record per regime, seed and method."""
        total = len(self.label_noise) * len(self.seeds) * len(self.methods) * self.recipe.steps
        with tqdm(total=total, unit="step", dynamic_ncols=True, mininterval=0.5) as progress:
            for noise in self.label_noise:
                for seed in self.seeds:
                    for method in self.methods:
                        progress.set_description(f"{regime_name(noise)}, seed {seed}, {method.label}")
                        yield self._run(noise, seed, method, progress)

    def _run(self, noise: float, seed: int, method: Method, progress: tqdm) -> dict[str, Any]:
        examples = self.task.train(seed, noise)
        model = trainable_copy(self.model, self.recipe.tuning, seed)
        batches = training_batches(examples, self.tokenizer, self.recipe, seed, self.model.device)
        curve = finetune(model, batches, self.recipe, method, seed, progress)
        scores = evaluate(self.task, model, self.tokenizer, self.recipe.max_length)
        last = max(1, self.recipe.steps // 10)
        return {
            "regime": regime_name(noise),
            "method": method.key,
            "seed": seed,
            **asdict(scores),
            "final_sft_loss": statistics.fmean(curve.sft_loss[-last:]),
            "curve": asdict(curve),
        }

    def costs(self, rounds: int) -> dict[str, Cost]:
        """Step time and memory of each method, measured apart from the runs."""
        examples = self.task.train(self.seeds[0], 0.0)
        batch = next(training_batches(examples, self.tokenizer, self.recipe, 0, self.model.device))
        return measure_costs(self.model, self.methods, batch, self.recipe, rounds)


def regime_name(label_noise: float) -> str:
    """How a share of wrong answers is called in tables and plots."""
    return "clean answers" if label_noise == 0 else f"{label_noise:.0%} wrong answers"
