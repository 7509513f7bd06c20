"""Compiles the kernels for GPUs that this machine need not have; prints what each binary uses as JSON."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lfu_reg.distances.kernels.problem import describe_problems
from lfu_reg.distances.kernels.table import build_table
from lfu_reg.distances.kernels.triton_kernels import backward_kernel, forward_kernel
from lfu_reg.distances.kernels.triton_launch import launch_options

with suppress(ImportError):  # triton 3.2
    from triton.backends.compiler import AttrsDescriptor

ARCHITECTURES = (80, 90)
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# name: hidden size, dtypes of the two sides, whether there is an index
CASES = {
    "bf16, hidden 4096": (4096, (BRAIN, BRAIN), False),
    "bf16, hidden 4096, index": (4096, (BRAIN, BRAIN), True),
    "bf16, hidden 128, index": (128, (BRAIN, BRAIN), True),
    "fp16, hidden 2560": (2560, (HALF, HALF), False),
    "fp32, hidden 4096, index": (4096, (SINGLE, SINGLE), True),
    "bf16 and fp32, hidden 1024": (1024, (BRAIN, SINGLE), True),
    "bf16, hidden 1271, index": (1271, (BRAIN, BRAIN), True),
    "bf16 and fp32, hidden 257, index": (257, (BRAIN, SINGLE), True),
}


def options_of(hidden: int, dtypes: tuple[torch.dtype, torch.dtype], has_index: bool) -> dict[str, Any]:
    """The launch settings that are shipped for two layers of this kind."""
    h, h_prime = (torch.zeros(8, hidden, dtype=dtype) for dtype in dtypes)
    (problem,) = describe_problems([h] * 2, [h_prime] * 2, torch.arange(4) if has_index else None, "mean")
    return launch_options(dtypes, build_table(problem, [h] * 2, [h_prime] * 2, [True, True]))


def compile_kernel(kernel: Any, types: dict[str, str], options: dict[str, Any], architecture: int) -> Any:
    options = dict(options)
    warps = options.pop("num_warps", 4)
    # What a launch adds for addresses from the allocator: they are multiples of 16.
    aligned = [position for position, name in enumerate(kernel.arg_names) if name.endswith("_ptr")]
    if "constexprs" in inspect.signature(ASTSource).parameters:
        source = ASTSource(
            fn=kernel,
            signature={name: "constexpr" if name in options else types[name] for name in kernel.arg_names},
            constexprs={(kernel.arg_names.index(name),): value for name, value in options.items()},
            attrs={(position,): [["tt.divisibility", 16]] for position in aligned},
        )
    else:  # triton 3.2
        properties = {"tt.divisibility": aligned, "tt.equal_to": []}
        source = ASTSource(
            fn=kernel,
            signature={name: types[name] for name in kernel.arg_names if name not in options},
            constants=options,
            attrs=AttrsDescriptor.from_dict({"arg_properties": properties, "cls": "AttrsDescriptor"}),
        )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


def usage(compiled: Any) -> dict[str, int]:
    """Registers of a cubin, its instructions that spill them, and the width of its accesses."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        report, code = (
            subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"\bREG:(\d+)", report)
    assert found is not None
    assert "EXIT" in code
    narrow = re.findall(r"tt\.addptr [^\n]*: tensor<[^\n]*, tensor<\w+xi(?!64)\d+>", compiled.asm["ttir"])
    return {
        "registers": int(found[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "wide_loads": len(re.findall(r"ld\.global\.v4\.b32", compiled.asm["ptx"])),
        "narrow_stores": len(re.findall(r"st\.global(?:\.\w+)*\.b16", compiled.asm["ptx"])),
        "narrow_offsets": len(narrow),
    }


def main() -> None:
    types = {"table_ptr": "*i64", "partial_ptr": "*fp32", "upstream_ptr": "*fp32", "programs": "i32", "share": "i32"}
    results = {}
    for architecture in ARCHITECTURES:
        for name, (hidden, dtypes, has_index) in CASES.items():
            types |= {"to_clean_ptr": POINTERS[dtypes[0]], "to_perturbed_ptr": POINTERS[dtypes[1]]}
            options = options_of(hidden, dtypes, has_index)
            wanted = {"GRAD_CLEAN": False, "GRAD_PERTURBED": True}
            results[f"sm_{architecture}: {name}"] = {
                "forward": usage(compile_kernel(forward_kernel, types, options, architecture)),
                "backward": usage(compile_kernel(backward_kernel, types, options | wanted, architecture)),
            }
    sys.stdout.write(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
