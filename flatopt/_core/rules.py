"""The layout that ``strategy="auto"`` takes on each platform; see ``docs/strategies.md``."""

from flatopt._core import jaxprs, platforms

LOOPS = ("scan", "while")
MOST_UNROLLED = 16
MOST_UNROLLED_VALUES = 1_000_000
MOST_UNROLLED_CONVOLUTIONS = 16
MOST_BATCHED_BYTES = {"gpu": 128e6, "tpu": 512e6}
MOST_BATCHED_FLOPS = 2e9  # of a convolution: some 10 microseconds of a TPU v5e


def strategy_on_cpu(jaxpr, num_samples, rematerialize=False):
    """A loop, but for convolutions in two cases.

    Few parameters in few layers: XLA runs the samples side by side, which is a little
    faster, and their compile time is made up for within 500 steps. Convolutions that XLA
    would run slowly in a loop: those that cannot be rewritten, and those of a backward pass
    that is still to come.
    """
    if (
        num_samples <= MOST_UNROLLED
        and jaxprs.has_convolution(jaxpr)
        and (_is_small(jaxpr) or rematerialize or not jaxprs.are_fast_in_loops(jaxpr))
    ):
        return "unroll"
    return "scan"


def strategy_on_gpu(jaxpr, num_samples, is_split):
    """All chunks of a batch at once where the network is of dense layers alone, and small.

    A loop would start many small kernels. A whole batch for each sample would multiply the
    activations, so it takes the loop.
    """
    is_dense = not _has(jaxpr, jaxprs.CONVOLUTION)
    is_batched = is_dense and _can_be_batched(jaxpr, num_samples, is_split, "gpu")
    return "vmap" if is_batched else "scan"


def strategy_on_tpu(jaxpr, num_samples, is_split):
    """All chunks of a batch at once where the network is small, or its kernels would be.

    Small convolutions take the time of their start, chunk by chunk. All chunks at once they
    are grouped, which takes a TPU up to twice the time of one, so large ones take the loop.
    """
    is_batched = _can_be_batched(jaxpr, num_samples, is_split, "tpu")
    if is_batched and _has(jaxpr, jaxprs.CONVOLUTION):
        flops = jaxprs.convolution_flops(jaxpr)
        is_batched = sum(flops) <= MOST_BATCHED_FLOPS * len(flops)
    return "vmap" if is_batched else "scan"


def has_loop(jaxpr):
    """Whether a jaxpr holds a loop, such as scanned layers."""
    return any(jaxprs.has_primitive(jaxpr, name) for name in LOOPS)


def _can_be_batched(jaxpr, num_samples, is_split, platform):
    """Whether a copy of the parameters for each chunk is small, and no loop is inside."""
    size = 4 * num_samples * _num_values(jaxpr)
    is_small = size <= MOST_BATCHED_BYTES[platform]
    return is_split and is_small and not any(_has(jaxpr, name) for name in LOOPS)


def _has(jaxpr, name):
    return jaxprs.has_primitive(jaxpr, name, platforms.ELSEWHERE)


def _is_small(jaxpr):
    return (
        _num_values(jaxpr) <= MOST_UNROLLED_VALUES
        and jaxprs.num_convolutions(jaxpr) <= MOST_UNROLLED_CONVOLUTIONS
    )


def _num_values(jaxpr):
    return sum(v.aval.size for v in jaxpr.outvars)
