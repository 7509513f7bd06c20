"""What is run, in order of worth, and how long each part may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One function of a stage.

    Attributes:
        name: in the result file.
        function: "module:function" of this package; it takes a Place and returns what goes into the result file.
        seconds: after which it counts as hung.
    """

    name: str
    function: str
    seconds: float = 120


@dataclass(frozen=True)
class Stage:
    """Parts that share a process as long as it lives, and a result file.

    Attributes:
        name: of the result file.
        about: what it is for.
        minutes: all parts together.
        parts: in order of worth.
    """

    name: str
    about: str
    minutes: float
    parts: tuple[Part, ...]


STAGES = (
    Stage(
        "smoke",
        "whether it works at all: the kernel against its twin, and a step in every mode against the plain one",
        4,
        (
            Part("kernel against the twin", "smoke:kernel_against_twin"),
            Part("float32 step", "smoke:float32"),
            Part("bfloat16 step", "smoke:bfloat16"),
            Part("float16 step with GradScaler", "smoke:float16"),
            Part("checkpointing", "smoke:checkpointing"),
            Part("memory comes back", "smoke:memory"),
            Part("side stream", "smoke:side_stream"),
            Part("compile", "smoke:compiled", 150),
            Part("graph capture of the kernel", "smoke:capture", 60),
        ),
    ),
    Stage(
        "kernel",
        "the fused distance: share of copy bandwidth, its opponents, launch cost, other shapes, tile sizes",
        4,
        (
            Part("headline", "kernels:headline", 100),
            Part("launch cost", "kernels:launch_cost", 60),
            Part("shapes", "kernels:shapes", 180),
            Part("tile sizes", "kernels:tile_sizes", 120),
        ),
    ),
    Stage(
        "step",
        "the step at the shape of Llama-3.1-8B: time, memory, phases, what waits, what is between the passes",
        8,
        (
            Part("exact", "steps:exact", 240),
            Part("methods", "steps:methods", 180),
            Part("interleaved", "steps:interleaved", 300),
            Part("waits", "steps:waits", 60),
            Part("between the passes", "steps:between", 120),
        ),
    ),
    Stage("tests", "the tests marked cuda", 3, (Part("marked cuda", "marked:tests", 180),)),
    Stage(
        "smollm2",
        "a model of 135 M parameters: what a step costs, and fine-tuning with and without LfU",
        4,
        (
            Part("cost", "smollm2:cost", 120),
            *(Part(f"study, {name}", f"smollm2:{name}", 90) for name in ("sft", "steering", "lora")),
        ),
    ),
    Stage(
        "nccl",
        "engines over a process group of one: nothing but the calls is tested",
        1.5,
        (Part("DDP", "engines:ddp", 60), Part("FSDP2", "engines:fsdp2", 60)),
    ),
)

# Of a rehearsal alone: every way in which a part can end but well, and what comes after it goes on.
FAILURES = Stage(
    "failures",
    "ways to fail",
    1,
    (
        Part("raises", "failures:raises"),
        Part("runs out of memory", "failures:runs_out_of_memory"),
        Part("has nothing to do", "failures:has_nothing_to_do"),
        Part("hangs", "failures:hangs", 1),
        Part("is killed", "failures:is_killed"),
        Part("loses the device", "failures:loses_the_device"),
        Part("goes on", "failures:goes_on"),
    ),
)
