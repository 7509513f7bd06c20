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

from lfu_reg.distances.kernels import mse_gpu, mse_triton
from lfu_reg.distances.kernels.mse_problem import describe_problems
from lfu_reg.distances.kernels.mse_rows import Group
from lfu_reg.distances.kernels.mse_table import build_table, strides_of

with suppress(ImportError):  # triton 3.2
    from triton.backends.compiler import AttrsDescriptor

ARCHITECTURES = (80, 90)
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def group_of(shape: tuple[int, ...], clean: torch.dtype, perturbed: torch.dtype, strided: bool = False) -> Group:
    """The launch settings that are shipped for two layers of this kind."""
    h, h_prime = torch.zeros(shape, dtype=clean), torch.zeros(shape, dtype=perturbed)
    if strided:
        h = h.transpose(0, 1).contiguous().transpose(0, 1)
    (problem,) = describe_problems([h] * 2, [h_prime] * 2, None, None, "mean", "clean", False)
    sides = problem.clean, problem.perturbed
    (group,) = build_table(problem, *sides, (True, True), strides_of(*sides)).rows.groups
    return group


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# name: launch settings, whether there is an index, whether the clean states are overwritten
CASES: dict[str, tuple[Group, bool, bool]] = {
    "bf16, hidden 4096": (group_of((1, 8, 4096), BRAIN, BRAIN), False, False),
    "bf16, hidden 4096, index": (group_of((1, 8, 4096), BRAIN, BRAIN), True, False),
    "bf16, hidden 4096, overwrite": (group_of((1, 8, 4096), BRAIN, BRAIN), True, True),
    "bf16, hidden 128, index": (group_of((8, 32, 128), BRAIN, BRAIN), True, False),
    "fp16, hidden 2560": (group_of((1, 8, 2560), HALF, HALF), False, False),
    "fp32, hidden 4096, index": (group_of((1, 8, 4096), SINGLE, SINGLE), True, False),
    "bf16 and fp32, hidden 1024": (group_of((1, 8, 1024), BRAIN, SINGLE), True, False),
    "bf16, hidden 1271, index": (group_of((1, 8, 1271), BRAIN, BRAIN), True, False),
    "fp32, hidden 257, strided, index": (group_of((4, 8, 257), SINGLE, SINGLE, strided=True), True, False),
}


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
    table = {"table_ptr": "*i64", "partial_ptr": "*fp32", "weights_ptr": "*fp32", "mask_ptr": "*u8"}
    numbers = {"first": "i32", "programs": "i32", "share": "i32", "count": "i32"}
    scalars = {"upstream_ptr": "*fp32", "loss_ptr": "*fp32", "per_layer_ptr": "*fp32"}
    results = {}
    for architecture in ARCHITECTURES:
        for name, (group, index, overwrite) in CASES.items():
            types = {**table, **numbers, **scalars}
            types |= {"to_perturbed_ptr": POINTERS[group.perturbed], "to_clean_ptr": POINTERS[group.clean]}
            options = {**mse_gpu._options(group), "HAS_INDEX": index, "OVERWRITE": overwrite}
            forward = compile_kernel(mse_triton.forward_kernel, types, options, architecture)
            options |= {"HAS_WEIGHTS": True, "GRAD_PERTURBED": not overwrite, "GRAD_CLEAN": False}
            backward = compile_kernel(mse_triton.backward_kernel, types, options, architecture)
            results[f"sm_{architecture}: {name}"] = {"forward": usage(forward), "backward": usage(backward)}
        reduce = {"HAS_WEIGHTS": False, "BLOCK_K": 16, "BLOCK_P": 256, "num_warps": 8}
        small = {
            "reduce": usage(compile_kernel(mse_triton.reduce_kernel, types, reduce, architecture)),
            "mask": usage(compile_kernel(mse_triton.mask_kernel, types, {"BLOCK_N": 1024}, architecture)),
        }
        results[f"sm_{architecture}: small kernels"] = small
    sys.stdout.write(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
