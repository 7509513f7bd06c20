"""One model of the zoo against the oracle: gradients, the layers and linear maps found, and what is left behind."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lfu_reg import LfURegularizer, LfUWarning
from tests.support.cases import Batch, Case
from tests.support.compare import Gradients, gradients_of
from tests.support.float64 import everywhere
from tests.support.harness import auxiliary, run_pair
from tests.support.snapshots import Snapshot, buffers_of, differing
from tests.zoo.inputs import batch_for, loss_of
from tests.zoo.observe import Observation, mask_from, observe
from tests.zoo.species import NoDropoutError, Species, default_dtype
from tests.zoo.table import channel_axis, is_named

TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-2}
# What l_cons adds to the gradient, relative to it. The error of that part is measured by itself: this little is enough.
LEAST_EFFECT = {torch.float64: 1e-5, torch.float32: 1e-3}
SEED = 11
ALPHA, LAM = {"lora": 0.3, "steering": 0.1, "weights": 0.1}, 5.0


@dataclass
class Findings:
    """A row of the results; errors are relative, the largest over all parameters."""

    task: str
    model_type: str
    class_name: str
    outcome: str = "exact"
    dtype: str = ""
    blocks: int = 0
    ran: int = 0
    linears: int = 0
    lora: str = ""
    steering: str = ""
    weights: str = ""
    dropout: str = ""
    effect: str = ""
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def row(self) -> dict[str, str]:
        """For a CSV file."""
        return {**{key: str(value) for key, value in asdict(self).items()}, "remarks": " | ".join(self.remarks)}


def examine(species: Species, auxiliaries: tuple[str, ...] = ("steering", "lora", "weights")) -> Findings:
    """Everything that the zoo asks of one species. Never raises: what goes wrong is in the outcome and the remarks."""
    start = time.monotonic()
    findings = Findings(species.task, species.model_type, species.class_name)
    for dtype in (torch.float64, torch.float32):
        findings = Findings(species.task, species.model_type, species.class_name, dtype=str(dtype)[6:])
        with contextlib.ExitStack() as stack:
            stack.enter_context(default_dtype(dtype))
            if dtype is torch.float64:
                stack.enter_context(everywhere())
            try:
                model = species.make()
                batch = batch_for(species.task, model)
                loss_of(copy.deepcopy(model), batch).backward()
            except Exception as error:
                findings.outcome = "not built"
                findings.remarks.append(_short(error))
                continue
            _step_by_step(species, findings, model, batch, dtype, auxiliaries)
        break
    findings.seconds = round(time.monotonic() - start, 1)
    return findings


def _step_by_step(
    species: Species,
    findings: Findings,
    model: nn.Module,
    batch: Batch,
    dtype: torch.dtype,
    auxiliaries: tuple[str, ...],
) -> None:
    for name in (*auxiliaries, "dropout"):
        kind = "steering" if name == "dropout" else name
        if name == "dropout":
            try:
                model = species.make(dropout=0.3)
            except (NoDropoutError, ValueError):  # some say that they have no dropout
                findings.dropout = "none"
                continue
        try:
            with _warnings_into(findings, name):
                error = _compare(species, findings, copy.deepcopy(model), batch, kind, dtype, name == "dropout")
        except Exception as error_raised:
            findings.remarks.append(f"{name}: {_short(error_raised)}")
            told = any(remark.startswith(f"warns ({name})") for remark in findings.remarks)
            setattr(findings, name, "refused" if _is_ours(error_raised) else "warned" if told else "failed")
            continue
        setattr(findings, name, f"{error:.1e}")
        if not error <= TOLERANCE[dtype]:
            findings.remarks.append(f"{name}: gradients differ from the oracle's")
    columns = [getattr(findings, name) for name in (*auxiliaries, "dropout")]
    numbers = [float(c) for c in columns if c and c[0].isdigit()]
    if "failed" in columns or any(not number <= TOLERANCE[dtype] for number in numbers):
        findings.outcome = "wrong"
    elif "refused" in columns:
        findings.outcome = "refused" if not numbers else "partly"
    elif any(remark.startswith("warns") and not is_named(remark) for remark in findings.remarks):
        findings.outcome = "warned"


def _compare(
    species: Species,
    findings: Findings,
    model: nn.Module,
    batch: Batch,
    kind: str,
    dtype: torch.dtype,
    noisy: bool,
) -> float:
    before = Snapshot.of(model)
    keys = list(model.state_dict())
    plain = copy.deepcopy(model)
    with LfURegularizer(model, auxiliary(kind)) as reg:
        layers = reg.layers
    before.check(model)
    seen = observe(copy.deepcopy(model), layers, lambda m: loss_of(m, batch))
    findings.blocks, findings.ran = len(layers), len(seen.shapes)
    axis = partial(channel_axis, species.task, species.model_type)
    case = Case(species.model_type, lambda: model, lambda: batch, loss_of, mask_from(seen, axis), layers, 0, axis)
    pair = run_pair(case, kind, model=model, batch=batch, seed=SEED, alpha=ALPHA[kind], lam=LAM)
    pair.backward()
    if kind == "lora":
        _same_linears(findings, seen, set(pair.reg.perturbation))
    values = abs(float(pair.reg.metrics["consistency_loss"]) / float(pair.want.consistency) - 1)
    assert values <= 10 * TOLERANCE[dtype], f"l_cons is off by {values:.1e}"

    torch.manual_seed(SEED)
    loss_of(plain, batch).backward()
    error, where = _error(gradients_of(model), pair.want.gradients, gradients_of(plain))
    if error > TOLERANCE[dtype]:
        findings.remarks.append(f"{kind}: {where} is off")
    _has_an_effect(findings, gradients_of(plain), pair.want.gradients, LEAST_EFFECT[dtype])
    pair.reg.remove()
    _as_after_plain_sft(model, plain, batch)
    assert list(model.state_dict()) == keys, "state_dict keys changed"
    return error


def _as_after_plain_sft(model: nn.Module, plain: nn.Module, batch: Batch) -> None:
    """Hooks, flags, attributes, parameters, buffers and outputs: some models change themselves in their forward."""
    now, want = Snapshot.of(model), Snapshot.of(plain)
    for part in ("hooks", "tensor_hooks", "flags", "training", "attributes"):
        assert getattr(now, part) == getattr(want, part), f"{part} changed"
    values = ({name: value for name, (_, value) in s.parameters.items()} for s in (now, want))
    assert not differing(*values), "parameters changed"
    assert not differing(buffers_of(model), buffers_of(plain)), "buffers are not those of plain SFT"
    model.eval(), plain.eval()
    with torch.no_grad():
        outputs = []
        for one in (model, plain):
            torch.manual_seed(SEED)
            outputs.append(loss_of(one, batch))
    assert torch.equal(*outputs), "outputs after remove() are not bit-identical"


def _error(got: Gradients, want: Gradients, sft: Gradients) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient, or of what l_cons adds to all of them, and where.

    A gradient below 1e-4 of the whole (attention's key bias has none but for rounding) is held to the whole.
    """
    assert got.keys() == want.keys()
    whole, added = _norm(want), _norm(_differences(want, sft))
    errors = {n: float(d.norm()) / (_norm({n: want[n]}) + 1e-4 * whole) for n, d in _differences(got, want).items()}
    errors["the consistency term"] = _norm(_differences(got, want)) / max(added, 1e-300)
    assert all(error == error for error in errors.values()), "a gradient is not finite"
    where = max(errors, key=lambda name: errors[name])
    return errors[where], where


def _has_an_effect(findings: Findings, sft: Gradients, want: Gradients, least: float) -> None:
    """Gradients that agree say nothing where lam = 0 has the same ones."""
    assert _norm(sft) > 0, "the SFT gradient is zero"
    effect = _norm(_differences(want, sft)) / _norm(sft)
    findings.effect = f"{min(effect, float(findings.effect or 'inf')):.1e}"
    assert effect > least, f"a comparison of nothing, the effect is {effect:.1e}"


def _differences(left: Gradients, right: Gradients) -> dict[str, Tensor]:
    pairs = {name: (left[name], right[name]) for name in left}
    return {
        name: one if other is None else -other if one is None else one - other
        for name, (one, other) in pairs.items()
        if one is not None or other is not None
    }


def _norm(gradients: Gradients) -> float:
    return sum(float(g.norm()) ** 2 for g in gradients.values() if g is not None) ** 0.5


def _same_linears(findings: Findings, seen: Observation, moved: set[str]) -> None:
    findings.linears = len(moved)
    if missing := seen.linears - moved:
        findings.remarks.append(f"lora: {len(missing)} linear maps without a delta, e.g. {min(missing)}")
    if extra := moved - seen.linears:
        findings.remarks.append(f"lora: {len(extra)} deltas on other modules, e.g. {min(extra)}")


@contextmanager
def _warnings_into(findings: Findings, name: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LfUWarning)
        try:
            yield
        finally:
            told = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, LfUWarning))
            findings.remarks += [f"warns ({name}): {message[:120]}" for message in told]


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _is_ours(error: BaseException) -> bool:
    """Whether the library itself refused, as opposed to something that broke on the way."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "/lfu_reg/" in trace.tb_frame.f_code.co_filename
