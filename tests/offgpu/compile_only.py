"""Compile Triton kernels without a GPU: after install(90), every `kernel[grid](cpu_tensors)` is compiled for
Hopper exactly as for a launch (types, divisibility and constants specialised alike), but not launched. A test
can call the project's own wrappers and inspect the compiled kernel of each launch.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

# shared bytes per block; nothing here enforces it
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
MAX_REGISTERS = 65_536  # per multiprocessor


class NoLaunch:
    """Stand-in for the C launch function."""

    launch_cooperative_grid = False

    def __init__(self, source, metadata):
        pass

    def __call__(self, *args):
        pass


class Utils:
    """Device properties that the compiler asks for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_device_properties(self, device) -> dict:
        return {
            "max_shared_mem": SHARED_LIMIT[self.arch],
            "multiprocessor_count": 132,
            "warpSize": 32,
            "max_num_regs": MAX_REGISTERS,
        }

    def load_binary(self, name, cubin, shared, device) -> tuple:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills (see read_resources), threads


class Driver:
    launcher_cls = NoLaunch

    def __init__(self, arch: int):
        self.target, self.utils = GPUTarget("cuda", arch, 32), Utils(arch)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        return ty


def install(arch: int):
    triton.runtime.driver.set_active(Driver(arch))


def launches(kernel) -> list:
    """Compiled variants of one @triton.jit function."""
    return list(kernel.device_caches[0][0].values())


def assembler(arch: int) -> str:
    """Path of the ptxas that Triton uses, which differs for Blackwell."""
    return (triton.knobs.nvidia.ptxas_blackwell if arch >= 100 else triton.knobs.nvidia.ptxas).path


def stack_pointer_reads(cubin: str) -> list[str]:
    """Find shifts, masks, byte selections and float8 casts that read R1, the stack pointer.

    ptxas 12.8 writes R1 where it has lost a value.
    """
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", cubin]  # no data flow: half the time
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"(?:LOP3|PRMT|SHF|F2FP)\S* R\d+,.*\bR1\b.*?;", said)


def read_resources(compiled) -> dict:
    """Report registers, spills and stack per thread, shared bytes per block, and counts of matrix and copy
    instructions, from ptxas and the PTX."""
    arch = compiled.metadata.target.arch
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        said = subprocess.run(
            [assembler(arch), "-v", target, str(ptx), "-o", f"{ptx}.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        reads, has_float8 = [], re.search("e5m2|e4m3", compiled.asm["ptx"]) is not None
        if has_float8:  # seconds for a large kernel
            cubin = Path(folder, "own.cubin")  # made with Triton's own options
            cubin.write_bytes(compiled.asm["cubin"])
            reads = stack_pointer_reads(str(cubin))
    number = lambda pattern: int(re.search(pattern, said).group(1))
    count = lambda pattern: len(re.findall(pattern, compiled.asm["ptx"]))
    return {
        "registers": number(r"Used (\d+) registers"),
        "stack": number(r"(\d+) bytes stack frame"),
        "spilled": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "float8": has_float8,
        "stack_pointer_reads": reads,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "wgmma": count(r"wgmma\.mma_async"),
        "tcgen05": count(r"tcgen05\.mma"),
        "mma": count(r"\bmma\.sync"),
        "async_copies": count(r"cp\.async\.c[ag]"),
        "bulk_copies": count(r"cp\.async\.bulk\.tensor"),
    }
