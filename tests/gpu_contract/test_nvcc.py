"""flash-attn's own CUDA sources, compiled by this machine's nvcc against the torch that is installed.

Proved: the pinned flash-attn can be built with this torch and this CUDA. Its forward kernel for a head dimension of 128
in bfloat16 (Llama 3) becomes machine code of compute capability 8.0, among it the variant that our calls take: causal,
sequences of any length. The file that Python calls is accepted by the C++ compiler. Not proved: that a kernel runs, or
what it computes; the other sources; newer compute capabilities; a link, for torch's CPU build has no CUDA library.

Measured with nvcc 13.0, in seconds of CPU time: sources 12, kernel 100, interface 23, each fault 4. That is two and a
half minutes on two cores, and nine and a half where others use them as well. flash-attn's own switches leave out what a
Llama does not use; the file for a head dimension of 64 takes 150 s without them.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.launching import REPOSITORY

NVCC = shutil.which("nvcc")
KERNEL = "flash_fwd_hdim128_bf16_causal_sm80.cu"
WITHOUT = ("DROPOUT", "ALIBI", "SOFTCAP", "UNEVEN_K")
# The switches of flash_fwd_kernel's template, after the traits of the head dimension and the dtype.
SWITCHES = "dropout causal local alibi even_lengths even_head_dim softcap return_softmax".split()
TAKEN = {"causal", "even_head_dim"}  # "even" lengths would be those of a padded batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the package index has of the pinned flash-attn: its sources, and those of CUTLASS."""
    folder = tmp_path_factory.mktemp("flash_attn")
    pinned = re.search(r"^flash-attn==\S+", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", "--no-build-isolation"]
    subprocess.run(
        [*pip, pinned.group()], cwd=folder, env={**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}, check=True
    )
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        wanted = re.compile(r"[^/]+/(setup\.py|csrc/flash_attn/.*|csrc/cutlass/include/.*)")
        file.extractall(folder, [m for m in file if wanted.fullmatch(m.name)], filter="data")
    (setup,) = folder.glob("*/setup.py")
    return setup.parent


def _own_flags(source: Path) -> list[str]:
    """The flags that the package gives nvcc, read from its setup.py."""
    lists = [
        node.value
        for node in ast.walk(ast.parse((source / "setup.py").read_text()))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "nvcc_flags"
    ]
    return ast.literal_eval(lists[0])


def _compile(source: Path, file: str, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run nvcc on a file of csrc/flash_attn."""
    includes = [source / "csrc/flash_attn", source / "csrc/flash_attn/src", source / "csrc/cutlass/include"]
    includes += [Path(path) for path in (*include_paths(), sysconfig.get_path("include"))]
    generated = "c10/cuda/impl/cuda_cmake_macros.h"
    if not any((folder / generated).exists() for folder in includes):  # torch's CPU build lacks this one header
        stub = out.parent / "stubs" / generated
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text("#pragma once\n")
        includes.append(out.parent / "stubs")
    switches = [f"-DFLASHATTENTION_DISABLE_{name}" for name in WITHOUT]
    command = [str(NVCC), "-w", *_own_flags(source), *switches, *(f"-I{folder}" for folder in includes), *flags]
    command += ["-gencode=arch=compute_80,code=sm_80", "-c", str(source / "csrc/flash_attn" / file), "-o", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _compile_interface(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    only_check = ["-DTORCH_EXTENSION_NAME=flash_attn_2_cuda", "-Xcompiler=-fsyntax-only"]
    return _compile(source, "flash_api.cpp", out, *only_check)


def _faulty(source: Path, folder: Path, old: str, new: str) -> Path:
    """A copy of the sources in which flash.h, the arguments of every kernel, says something else."""
    shutil.copytree(source / "csrc/flash_attn", folder / "csrc/flash_attn")
    shutil.copy(source / "setup.py", folder)
    (folder / "csrc/cutlass").symlink_to(source / "csrc/cutlass")
    header = folder / "csrc/flash_attn/src/flash.h"
    stock = header.read_text()
    assert old in stock
    header.write_text(stock.replace(old, new))
    return folder


def _kernels(code: bytes) -> list[tuple[int, set[str]]]:
    """Head dimension, and the switches that are on, of every kernel that has machine code in an object file."""
    name = re.compile(
        rb"\.text\._ZN5flash16flash_fwd_kernelI23Flash_fwd_kernel_traitsILi(\d+)E\w*?bfloat16_t\w*?EE((?:Lb[01]E){8})EE"
    )
    found = {(int(dim), re.sub(rb"[^01]", b"", switches).decode()) for dim, switches in name.findall(code)}
    return [(dim, {s for s, on in zip(SWITCHES, bits, strict=True) if on == "1"}) for dim, bits in sorted(found)]


def test_the_kernel_our_calls_take_becomes_machine_code(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "kernel.o"
    done = _compile(source, f"src/{KERNEL}", out, "-Xfatbin=-compress=false")
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = _kernels(out.read_bytes())
    assert (128, TAKEN) in kernels
    assert all(dim == 128 and "causal" in switches for dim, switches in kernels)
    host = subprocess.run(["nm", "-C", str(out)], capture_output=True, text=True, check=True).stdout
    assert re.search(r" T void flash::run_mha_fwd_<cutlass::bfloat16_t, 128, true>\(", host)


def test_the_interface_is_accepted(source: Path, tmp_path: Path) -> None:
    done = _compile_interface(source, tmp_path / "api.o")
    assert done.returncode == 0, done.stderr[-4000:]


def test_an_argument_of_another_name_shows(source: Path, tmp_path: Path) -> None:
    faulty = _faulty(source, tmp_path, "cu_seqlens_k;", "cu_seqlens_keys;")
    done = _compile(faulty, f"src/{KERNEL}", tmp_path / "kernel.o")
    assert done.returncode != 0
    assert "cu_seqlens_k" in done.stderr


def test_a_kernel_with_other_arguments_than_its_caller_shows(source: Path, tmp_path: Path) -> None:
    faulty = _faulty(
        source, tmp_path, "run_mha_fwd_(Flash_fwd_params &params,", "run_mha_fwd_(const Flash_fwd_params &params,"
    )
    done = _compile(faulty, f"src/{KERNEL}", tmp_path / "kernel.o")
    assert done.returncode != 0
    assert "run_mha_fwd_" in done.stderr
