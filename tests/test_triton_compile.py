"""Every configuration of the Triton kernels, compiled for sm_80, 90 and 120 without a GPU: spills, shared memory."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.triton, pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")]

# Shared memory; of the GPUs of a family the least.
ARCHITECTURES = {80: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
CHANNELS = (9, 45, 96, 189)
ALWAYS_ALIGNED = ("padded", "plane", "split_places")
SIZES = ("places", "x_image", "x_channel", "y_image", "y_channel", "sr_image", "sr_channel", "gt_image", "gt_channel")
FLOATS = (
    "clamp",
    "inverse_clamp",
    "sharpness",
    "shift",
    "tolerance",
    "slope",
    "scale",
    "square_eps",
    "of_squared",
    "of_window",
    "of_phase",
    "moment_scale",
    "gram_scale",
    "log_weight",
    "inverse_temperature",
)


def signature(kernel, **pointers: str) -> dict[str, str]:
    types = {name: "fp32" if name in FLOATS else "i32" for name in kernel.arg_names}
    return types | {name: pointers.get(name, "*fp32") for name in kernel.arg_names if name.endswith("_ptr")}


def statistics_kernels(
    architecture: int, aligned: bool
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    from mghf_loss.ops import statistics_triton as module

    for channels, dtype, precision in product(CHANNELS, ("fp32", "bf16"), ("fast", "high")):
        if channels == 96:  # the tiles of 189
            continue
        tile = module.tiles(channels, {"fp32": 4, "bf16": 2}[dtype], precision, divmod(architecture, 10), aligned)
        pointers = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "gradient_ptr": f"*{dtype}", "keep_ptr": "*i1"}
        common = {"BLOCK_C": tile.channels, "PRUNED": True, "PRECISION": precision, "x_place": 1, "y_place": 1}
        forward = {**common, "BLOCK_P": tile.places, "BLOCKS": tile.blocks}
        label = f"{channels} channels, {dtype}, {precision}"
        kernel = module._diagonal_kernel
        yield f"diagonal {label}", kernel, signature(kernel, **pointers), {**forward, "GRAM": True}, tile.options
        if tile.blocks > 1:
            kernel = module._off_diagonal_kernel
            yield f"off-diagonal {label}", kernel, signature(kernel, **pointers), forward, tile.off_options
        kernel = module._backward_kernel
        backward = {**common, "BLOCK_K": tile.back_inner, "BLOCK_P": tile.back_places, "GRAM": True}
        yield f"backward {label}", kernel, signature(kernel, **pointers), backward, tile.back_options
        if (dtype, precision) == ("fp32", "fast"):
            kernel = module._add_gram_kernel
            constants = {"BLOCK_C": tile.channels, "BLOCKS": tile.blocks, "ROWS": 16}
            yield f"add gram {label}", kernel, signature(kernel), constants, module.launch_options(4, 2)
    kernel = module._merge_moments_kernel
    constants = {"BLOCK_C": 16, "BLOCK_S": 32}
    yield "merge moments", kernel, signature(kernel), constants, module.launch_options(4, 1)


def patch_nce_kernels(
    architecture: int, aligned: bool
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    from mghf_loss.ops import nce_triton as module

    packed = {"query_ptr": "*fp16", "key_ptr": "*fp16"}
    for channels, precision in product(CHANNELS, ("fast", "high")):
        tile = module.tiles(channels, precision, divmod(architecture, 10))
        common = {"D": tile.channels, "HIGH": precision == "high"}
        label = f"{channels} channels, {precision}"
        rows, options = tile.pack
        kernel = module._pack_kernel
        constants = {**common, "BLOCK_N": rows, "SCALE": module.SCALE, "sr_place": 1, "gt_place": 1}
        yield f"pack {label}", kernel, signature(kernel, **packed), constants, options
        if not aligned:  # the others read what this one has written
            continue
        for name, kernel, (rows, columns, options), more in (
            ("logits", module._logits_kernel, tile.logits, {}),
            ("half", module._half_iteration_kernel, tile.sinkhorn, {"RUNNING_MAXIMUM": False, "TRACK": True}),
            ("half, maximum", module._half_iteration_kernel, tile.sinkhorn, {"RUNNING_MAXIMUM": True, "TRACK": True}),
            ("loss", module._nce_kernel, tile.nce, {"JACOBIAN": True, "SCALE": module.SCALE}),
        ):
            constants = {**common, "BLOCK_M": rows, "BLOCK_N": columns, **more}
            yield f"{name} {label}", kernel, signature(kernel, **packed), constants, options
    for places in (128, 256, 512) if aligned else ():
        kernel = module._stored_sinkhorn_kernel
        constants = {"N": places, "BLOCK": 8192 // places}
        yield f"stored {places}", kernel, signature(kernel), constants, module.launch_options(8, 1)


def network_kernels(
    architecture: int, aligned: bool
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    from mghf_loss.ops import couplings_triton, linear_triton, local_triton

    for width, second, high in product((16, 128), (False, True), (False, True)) if aligned else ():
        columns, rows, options = couplings_triton.tiles(32, width)
        constants = {"CHANNELS": 9, "N1": 5, "HIDDEN": 32, "H": 32, "K": 16, "P": columns, "ROWS": rows}
        constants |= {"SECOND": second, "REPLICATE": False, "HIGH": high}
        pointers = {"sign_ptr": "*i32"}
        label = f"{width} columns, {'second' if second else 'first'}, {'high' if high else 'fast'}"
        for kernel, more in (
            (couplings_triton._half_kernel, {"KEEP": False}),
            (couplings_triton._half_kernel, {"KEEP": True}),
            (couplings_triton._half_backward_kernel, {}),
        ):
            types = signature(kernel, **pointers)
            yield f"{kernel.__name__} {label} {more}", kernel, types, constants | more, options
    for dtype, (rows, columns) in product(("fp32", "bf16"), ((4, 4), (1, 3), (100, 100))):
        pointers = dict.fromkeys(("x_ptr", "y_ptr", "gradient_ptr"), f"*{dtype}")
        padded, windows = local_triton.tile(columns)
        sizes, options = {"ROWS": rows, "COLUMNS": columns}, local_triton.OPTIONS
        for squared, (kernel, more) in product(
            (False, True),
            (
                (local_triton._local_kernel, {"PADDED": padded, "WINDOWS": windows}),
                (local_triton._local_backward_kernel, {"FEATURES": local_triton.FEATURES}),
            ),
        ):
            constants = {**sizes, **more, "SQUARED": squared}
            yield f"{kernel.__name__} {constants}, {dtype}", kernel, signature(kernel, **pointers), constants, options
    for count in (0, 2):
        for kernel, more in (
            (linear_triton._forward_kernel, {}),
            (linear_triton._transpose_kernel, {"LOW": True}),
            (linear_triton._transpose_kernel, {"LOW": False}),
        ):
            constants = {"COUPLINGS": count, "N1": 5, "R": linear_triton.ROWS, "P": linear_triton.PLACES, **more}
            yield f"linear level {count} {more}", kernel, signature(kernel), constants, linear_triton.OPTIONS


def compile_kernel(
    kernel: Any,
    architecture: int,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int],
    aligned: bool,
) -> Any:
    """The compiled kernel, as Triton has it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("ASTSource takes other arguments before Triton 3.3")
    names = kernel.arg_names
    assert set(constants) <= set(names), constants
    types = {name: "constexpr" if name in constants else types[name] for name in names}
    # PyTorch's allocations are aligned; sizes and strides are where they divide by 16.
    hints = [
        i
        for i, name in enumerate(names)
        if types[name].startswith("*") or name in ALWAYS_ALIGNED or (aligned and name in SIZES and types[name] == "i32")
    ]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in hints},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def assemble(ptx: str, folder: Path) -> str:
    """What the assembler says about registers and spills."""
    import triton

    source = folder / "kernel.ptx"
    source.write_text(ptx)
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    said = ""
    # Triton brings several; which one it takes for an architecture depends on its version.
    for assembler in sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*")):
        command = [str(assembler), "-v", "-arch", target[1], str(source), "-o", str(folder / "kernel.cubin")]
        run = subprocess.run(command, capture_output=True, text=True)
        said = run.stderr
        if run.returncode == 0:
            return said
    raise AssertionError(said)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernels", [statistics_kernels, patch_nce_kernels, network_kernels])
def test_compiles_without_spills(kernels, architecture, aligned, tmp_path):
    compiled = 0
    problems = []
    for label, kernel, types, constants, options in kernels(architecture, aligned):
        binary = compile_kernel(kernel, architecture, types, constants, options, aligned)
        ptx = binary.asm["ptx"]
        said = assemble(ptx, tmp_path)
        spills = re.search(r"(\d+) bytes spill stores", said)
        # Some assemblers spill a few bytes of the statistics of 9 and 45 channels on sm_120.
        most = 24 if kernels is statistics_kernels and architecture == 120 else 0
        if spills is None or int(spills[1]) > most:
            problems.append(f"{label}: {said}")
        if binary.metadata.shared > ARCHITECTURES[architecture]:
            problems.append(f"{label}: {binary.metadata.shared} bytes of shared memory")
        if ".f64" in ptx:
            problems.append(f"{label}: double precision")
        compiled += 1
    assert not problems, "\n".join(problems)
    assert compiled > 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_partial_gram_matrices_are_added_without_a_barrier_in_each_step(architecture):
    for label, kernel, types, constants, options in statistics_kernels(architecture, True):
        if label.startswith("add gram"):
            code = compile_kernel(kernel, architecture, types, constants, options, True).asm["ttgir"]
            start = code.index("scf.for")  # one loop, over the splits, ends where an accumulator is yielded
            assert "convert_layout" not in code[start : code.rindex("scf.yield %")], label
