"""The comparison: every run trained, scored at every scale of its adapter, and written down."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from lfu_reg.cli.compare.answers import text_of, write_answers
from lfu_reg.cli.compare.encoding import Tokens
from lfu_reg.cli.compare.plan import Grid, Run, Setting, best_rate
from lfu_reg.cli.compare.prepared import Prepared
from lfu_reg.cli.compare.progress import Progress
from lfu_reg.cli.compare.scoring import divergence, log_probabilities, score
from lfu_reg.cli.compare.store import Store
from lfu_reg.cli.compare.training import adapted, batches, scaled, train
from lfu_reg.diagnostics import LfUWarning

DRAWN, DRAWN_TOKENS = 12, 24  # answers that the base model draws, for the divergence from it
PASSING = (DeprecationWarning, FutureWarning)  # what packages tell each other
SHOWN_TOKENS = 40  # of an answer that is shown


class Experiment:
    """One model, on one set of rows.

    Args:
        model: the base model; an adapter is put on it for each run, and taken off again.
        prepared: rows and tokenizer.
        setting: what is the same for all runs.
        store: of their rows.
        progress: is told what happens.
    """

    def __init__(self, model: Any, prepared: Prepared, setting: Setting, store: Store, progress: Progress) -> None:
        self._model, self._prepared, self._setting = model, prepared, setting
        self._store, self._progress = store, progress
        self._where = {"pad": prepared.tokenizer.pad_token_id, "device": setting.device}

    def base(self) -> None:
        """Score the base model, unless that is done, and see what it answers."""
        self._progress.begins("the base model")
        base = self._store.base
        if base is None:
            torch.manual_seed(0)
            tokenizer, device = self._prepared.tokenizer, self._setting.device
            drawn = write_answers(self._model, tokenizer, self._prompts(DRAWN), DRAWN_TOKENS, device, drawn=True)
            self._base_answers = drawn
            self._base = log_probabilities(self._model, drawn, **self._where)
            point = self._point(self._model, 0.0)
            self._progress.evaluated("the base model")
            answers = [[list(answer.ids), answer.start] for answer in drawn]
            asked = {"questions": self._prepared.questions, "samples": self._samples(self._model)}
            self._store.add({"run": "base", "point": point, "drawn": answers, **asked})
        else:
            self._base_answers = [Tokens(tuple(ids), start) for ids, start in base["drawn"]]
            self._base = log_probabilities(self._model, self._base_answers, **self._where)

    def all(self, grid: Grid) -> None:
        """SFT's runs, then LfU's at the rate that suits SFT, as far as they are not there already."""
        self._each(grid.sft())
        rate = best_rate(self._store.rows)
        if rate is not None:
            self._each(grid.lfu(rate))

    def _each(self, runs: Iterable[Run]) -> None:
        for run in self._store.pending(runs):
            self._store.add(self._row(run))

    def _row(self, run: Run) -> dict[str, Any]:
        setting, rows = self._setting, self._prepared.train
        self._progress.begins(f"{run.setting}, seed {run.seed}")
        with warnings.catch_warnings(record=True) as caught, adapted(self._model, run.seed) as model:
            warnings.simplefilter("always", LfUWarning)
            order = batches(rows, setting.batch, setting.steps, run.seed)
            step = self._progress.step
            seen = train(model, run, order, auxiliary=setting.auxiliary, tick=step, **self._where)
            points = [] if seen.diverged else self._points(model, run)
            samples = self._samples(model) if points and run.seed == 0 else []
            if points:
                model.save_pretrained(self._store.adapter(run))
        result = f"held-out loss {points[-1]['domain']['loss']:.3f}" if points else "diverged"
        self._progress.run_is_over(run, f"{run.setting}, seed {run.seed}: {result}")
        return {
            "run": run.key,
            **asdict(run),
            "points": points,
            "step_seconds": [round(seconds, 4) for seconds in seen.seconds],
            "peak_mb": round(seen.peak_bytes / 1e6, 1),
            "train_loss": [round(loss, 5) for loss in seen.losses],
            "figures": seen.figures,
            "samples": samples,
            "warnings": sorted({str(one.message) for one in caught if not issubclass(one.category, PASSING)}),
        }

    def _points(self, model: Any, run: Run) -> list[dict[str, Any]]:
        """Scores at each scale of the adapter."""
        points = []
        for scale in self._setting.scales:
            with scaled(model, scale):
                points.append(self._point(model, scale))
            self._progress.evaluated(f"{run.setting}, seed {run.seed}, adapter x {scale:g}")
        return points

    def _point(self, model: Any, scale: float) -> dict[str, Any]:
        """What one model scores."""
        own = log_probabilities(model, self._base_answers, **self._where)
        domain = score(model, self._prepared.held_out, **self._where)
        kept = {part.name: score(model, part.sequences, **self._where) for part in self._prepared.kept}
        kl = divergence(self._base, own)
        return {"scale": scale, "domain": domain, "kept": kept, "kl": kl}

    def _samples(self, model: Any) -> list[str]:
        tokenizer, device = self._prepared.tokenizer, self._setting.device
        prompts = self._prompts(len(self._prepared.questions))
        written = write_answers(model, tokenizer, prompts, SHOWN_TOKENS, device, drawn=False)
        return [text_of(answer, tokenizer) for answer in written]

    def _prompts(self, count: int) -> list[tuple[int, ...]]:
        return [row.ids[: row.start] for row in self._prepared.held_out[:count]]
