"""The layout that ``strategy="auto"`` takes on each platform; see ``docs/strategies.md``."""

from flatopt._core import jaxprs, platforms

LOOPS = ("scan", "while")
MOST_UNROLLED = 16
MOST_UNROLLED_VALUES = 1_000_000
MOST_UNROLLED_CONVOLUTIONS = 16
MOST_BATCHED_BYTES = 512e6
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
    """All chunks of a batch at once where copies of the parameters are small.

    A loop would start many small kernels. Convolutions take it all the same: those of all
    chunks at once are grouped, and their gradients multiply zeros.
    """
    has_convolution = _has(jaxpr, jaxprs.CONVOLUTION)
    can_batch = _can_batch(jaxpr, num_samples, is_split)
    return "vmap" if can_batch and not has_convolution else "scan"


def strategy_on_tpu(jaxpr, num_samples, is_split):
    """As on GPU, but for small convolutions, which take all chunks at once too.

    Chunk by chunk they would take the time of their start. All chunks at once they take up
    to 1.7 times as long as one, so large ones take the loop.
    """
    can_batch = _can_batch(jaxpr, num_samples, is_split)
    flops = jaxprs.convolution_flops(jaxpr, platforms.ELSEWHERE)
    are_small = sum(flops) <= MOST_BATCHED_FLOPS * len(flops)
    return "vmap" if can_batch and are_small else "scan"


def has_loop(jaxpr):
    """Whether a jaxpr holds a loop, such as scanned layers."""
    return any(jaxprs.has_primitive(jaxpr, name) for name in LOOPS)


def _can_batch(jaxpr, num_samples, is_split):
    """Whether all chunks at once take hardly more memory than the whole batch in one.

    There is a copy of the parameters for each. Samples of the whole batch would multiply
    its activations; a loop of unknown length would go on for all until the last one ends.
    """
    size = 4 * num_samples * _num_values(jaxpr)
    return is_split and size <= MOST_BATCHED_BYTES and not _has(jaxpr, "while")


def _has(jaxpr, name):
    return jaxprs.has_primitive(jaxpr, name, platforms.ELSEWHERE)


def _is_small(jaxpr):
    return (
        _num_values(jaxpr) <= MOST_UNROLLED_VALUES
        and jaxprs.num_convolutions(jaxpr) <= MOST_UNROLLED_CONVOLUTIONS
    )


def _num_values(jaxpr):
    return sum(v.aval.size for v in jaxpr.outvars)
