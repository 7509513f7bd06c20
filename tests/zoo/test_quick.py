"""A dozen kinds of models from the zoo in every test run; the whole of it runs under the marker `zoo`."""

from __future__ import annotations

import pytest

from tests.support.architectures import IS_OLDER
from tests.zoo.examine import Findings, examine
from tests.zoo.run import examined
from tests.zoo.species import Species, catalogue
from tests.zoo.table import exception_of

EVERY = {(species.task, species.model_type): species for species in catalogue()}

# One of each thing that has broken a plugin of this kind: hybrids, routers, latent attention, several streams, several
# stacks, blocks called without gradients, time first, in-place activations on views, grouped maps, convolutions.
QUICK = (
    ("causal", "bloom"), ("causal", "deepseek_v3"), ("causal", "gpt_oss"), ("causal", "hrm_text"), ("causal", "jamba"),
    ("causal", "reformer"), ("causal", "xlnet"), ("masked", "ibert"), ("masked", "squeezebert"), ("seq2seq", "t5"),
    ("image", "resnet"), ("image", "swinv2"), ("audio", "wav2vec2"),
)  # fmt: skip


def check(findings: Findings) -> None:
    expected = exception_of(findings.task, findings.model_type)
    if IS_OLDER and findings.outcome == "not built":
        pytest.skip(f"an older transformers: {findings.remarks[-1]}")
    assert findings.outcome == (expected.outcome if expected else "exact"), findings.remarks
    if expected:
        assert expected.says in " | ".join(findings.remarks)
    if findings.outcome == "exact":
        assert findings.ran > 0
        assert findings.linears > 0
        assert float(findings.effect) > 0


@pytest.mark.parametrize("which", [key for key in QUICK if key in EVERY], ids="/".join)
def test_quick(which: tuple[str, str]) -> None:
    check(examine(EVERY[which]))


@pytest.mark.zoo
@pytest.mark.parametrize("species", EVERY.values(), ids=lambda s: f"{s.task}/{s.model_type}")
def test_whole(species: Species) -> None:
    check(examined(species))
