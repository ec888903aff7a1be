"""Strict numerics, eight devices, fixed seeds."""

import contextlib
import functools
import gc
import os
import pathlib

import jaxlib

# Compiling is most of the time: it is done without expensive passes, in one piece, and by
# the emitters that compile fastest. The doctests and the docs run with optimizations.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_parallel_codegen_split_count=1",
        # Later versions may lack these flags, and would not start with them.
        "--xla_cpu_use_fusion_emitters=false "
        "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE "
        * (jaxlib.__version__ < "0.11"),
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA runs independent collectives of a program at once, each of which holds a thread of all
# eight devices: with eight threads two of them may wait for each other forever.
os.environ.setdefault("NPROC", "32")
# What one test, one worker or one run has compiled serves the others: `make clean` forgets.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).parent.parent / ".jax_cache"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Where in the code an operation comes from is a help for profiles alone.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # workers share the cores

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# JAX makes an MLIR context for each program: a quarter of the time of compiling a small one,
# and more in a process that has made thousands. The tests share one.
with contextlib.suppress(ImportError, AttributeError):
    from jax._src.interpreters import mlir

    mlir.make_ir_context = functools.cache(mlir.make_ir_context)


# Programs are millions of objects that stay: looking for garbage among them less often
# saves a twentieth of the time.
gc.set_threshold(50_000, 10, 10)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs go before a process has mapped what Linux allows, 65,530 pieces.

    Each takes several; at the limit the compiler ends the process.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 35_000:
        jax.clear_caches()


@pytest.fixture
def standard_promotion():
    """For links of optax that mix dtypes themselves (adam, lookahead and others)."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
