"""Pretend that a CPU build of torch has an H100: under FakeTensorMode, torch.compile traces the trainers as
on CUDA and inductor compiles them to sm_90 machine code. Nothing runs.

    import pretend_cuda   # before torch

Uses private interfaces of torch 2.13, which requirements.txt pins. End the process with os._exit: torch's
own shutdown would query the device. Needs a C++ compiler; without one the process prints SKIP and exits
with 77.
"""

# ruff: noqa: E402  torch is imported after the hooks
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ARCH = 90


class NoCompiler(RuntimeError):
    """No C++ compiler, or it failed."""


def build() -> Path:
    """Build the hooks as a shared library, once per installation of torch, whose folder it is linked to."""
    source = HERE / "pretend_cuda.cpp"
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    torch_version = (torch_folder / "version.py").read_bytes()
    key = hashlib.sha256(source.read_bytes() + torch_version + os.fsencode(torch_folder)).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"pretend_cuda-{os.getuid()}-{key}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise NoCompiler("no C++ compiler here (g++, clang++ or CXX)")
    half = f"{library}.{os.getpid()}"
    include, lib = torch_folder / "include", torch_folder / "lib"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-std=c++20",
        f"-I{include}",
        f"-I{include}/torch/csrc/api/include",
        str(source),
        "-o",
        half,
        f"-L{lib}",
        "-lc10",
        "-ltorch_cpu",
        f"-Wl,-rpath,{lib}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoCompiler(f"{compiler} could not build {source.name}: {done.stderr[-2000:]}")
    os.replace(half, library)
    return library


assert "torch" not in sys.modules, "import pretend_cuda before torch"
try:
    library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
except NoCompiler as error:
    print(f"SKIP {error}", flush=True)
    os._exit(77)

import torch

library.install_guard()
import torch._inductor.config as inductor
import torch._subclasses.fake_tensor as fake_tensor
from torch._dynamo.device_interface import CudaInterface
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(HERE))
import compile_only

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65_536,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


def says(value):
    """Make a new function that returns value: dynamo tells functions apart by identity."""
    return lambda *args, **kwargs: value


class Driver(compile_only.Driver):
    """Triton driver with what inductor needs besides launches."""

    def get_device_interface(self):
        return torch.cuda

    def set_current_device(self, device):
        pass

    def get_benchmarker(self):
        return lambda function, quantiles=None, **kwargs: [1.0, 1.0, 1.0]

    def get_empty_cache_for_benchmark(self):
        return torch.empty(1)

    def clear_cache(self, cache):
        pass


def install_driver():
    import triton

    triton.runtime.driver.set_active(Driver(ARCH))


def pretend_torch_cuda():
    """Replace the Python side of torch.cuda that dynamo and the trainers use."""
    stream = SimpleNamespace(cuda_stream=0, device=torch.device("cuda:0"), stream_id=0)
    answers = dict(
        is_available=True,
        device_count=1,
        current_device=0,
        get_device_properties=H100,
        get_device_capability=(9, 0),
        get_device_name=H100.name,
        is_bf16_supported=True,
        synchronize=None,
        _lazy_init=None,
        set_device=None,
        _exchange_device=0,
        _maybe_exchange_device=0,
        set_rng_state=None,
        get_arch_list=["sm_90"],
        current_stream=stream,
    )
    for name, value in answers.items():
        setattr(torch.cuda, name, says(value))
    torch.cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    torch.version.cuda = "13.0"
    fake_tensor.init_gpu_context = says(None)  # the original allocates on CUDA
    torch._C._cuda_getCurrentRawStream = says(0)
    for name, value in dict(
        exchange_device=0,
        maybe_exchange_device=0,
        current_device=0,
        set_device=None,
        device_count=1,
        is_available=True,
        get_compute_capability=ARCH,
        synchronize=None,
        get_raw_stream=0,
        get_device_properties=H100,
    ).items():
        setattr(CudaInterface, name, staticmethod(says(value)))
    CudaInterface.Worker.get_device_properties = staticmethod(says(H100))
    CudaInterface.Worker.current_device = staticmethod(says(0))


def pretend_inductor():
    """Replace what inductor would do on a device: allocate, time, launch."""
    import torch._inductor.fx_passes.fuse_attention as fuse_attention
    import torch._inductor.fx_passes.pad_mm as pad_mm
    import torch._inductor.runtime.benchmarking as benchmarking
    import torch._inductor.runtime.triton_helpers as triton_helpers
    import torch._inductor.select_algorithm as select_algorithm

    guards = torch._C._dynamo.guards  # generated code allocates with these
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    guards._reinterpret_tensor = lambda x, size, stride, offset=0: torch.as_strided(
        x, size, stride, x.storage_offset() + offset
    )
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = says(None)  # these trace patterns on real CUDA tensors
    triton_helpers.set_driver_to_gpu = install_driver
    for timer in (benchmarking.Benchmarker, benchmarking.TritonBenchmarker, benchmarking.InductorBenchmarker):
        for name in ("benchmark", "benchmark_gpu", "benchmark_many_gpu"):
            setattr(timer, name, says(1.0))
    inductor.use_static_cuda_launcher = inductor.joint_graph_constant_folding = False
    inductor.compile_threads = 1  # worker processes would not be patched
    # no meta kernel for out=
    select_algorithm.extern_kernels._scaled_mm = lambda *args, out, **kwargs: out


def fake_mode() -> FakeTensorMode:
    """Return the mode in which everything is built and called."""
    torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(.., device="cuda") allocates on the device
    return FakeTensorMode(allow_non_fake_inputs=True)


pretend_torch_cuda()
pretend_inductor()
install_driver()


def on_device(trainer):
    """Make a trainer module buildable under fake_mode: parameters are moved one by one, because Module.to
    tries to swap fake tensors, and have no initial values. Hyperparameters keep theirs, which generated code
    reads: a fake tensor made from one number on the CPU stores it."""

    class OnDevice(trainer.GPT):
        def to(self, device):
            for module in self.modules():
                for name, p in module._parameters.items():
                    if p is not None:
                        p = torch.empty(p.shape, dtype=p.dtype, device=device)
                        module._parameters[name] = torch.nn.Parameter(p)
                for name, b in module._buffers.items():
                    module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=device)
            return self

        def init_weights(self, generator):
            pass

    trainer.GPT = OnDevice
    trainer.to_device = lambda x, device: torch.empty(x.shape, dtype=x.dtype, device=device)
