"""The same trajectories as public implementations, where these are installed.

``pip install flatopt[bench]`` brings them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt

torch = pytest.importorskip("torch")
peers = pytest.importorskip("pytorch_optimizer")

STEPS, RHO, RATE, MOMENTUM = 12, 0.2, 0.1, 0.9


def _network(single):
    """Weights and batches of a small tanh network, or of one dense layer."""
    rng = np.random.default_rng(0)
    shapes = [(6, 4)] if single else [(6, 8), (8,), (8, 4), (4,)]
    weights = [rng.normal(size=shape) / 2 for shape in shapes]
    inputs = rng.normal(size=(STEPS, 16, 6))
    labels = rng.integers(0, 4, size=(STEPS, 16))
    return weights, inputs, labels


def _logits(weights, inputs, tanh):
    if len(weights) == 1:
        return inputs @ weights[0]
    hidden = tanh(inputs @ weights[0] + weights[1][None])
    return hidden @ weights[2] + weights[3][None]


def _ours(link, single):
    weights, inputs, labels = _network(single)
    tx = optax.chain(link, optax.sgd(RATE, momentum=MOMENTUM))

    def value_fn(params, inputs, labels):
        logits = _logits(params, inputs, jnp.tanh)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def update(params, state, inputs, labels):
        updates, state = tx.update(
            None, state, params, value_fn=value_fn, inputs=inputs, labels=labels
        )
        return optax.apply_updates(params, updates), state

    params = [jnp.asarray(w) for w in weights]
    state = tx.init(params)
    for step in range(STEPS):
        params, state = update(params, state, inputs[step], labels[step])
    return [np.asarray(p) for p in params]


def _theirs(make, single):
    weights, inputs, labels = _network(single)
    params = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    optimizer = make(params)

    for step in range(STEPS):

        def closure(step=step):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = torch.nn.functional.cross_entropy(
                    _logits(params, torch.tensor(inputs[step]), torch.tanh),
                    torch.tensor(labels[step]),
                )
            loss.backward()
            return None, loss

        if not isinstance(optimizer, peers.GSAM):
            closure()
        optimizer.step(closure)
    return [p.detach().numpy() for p in params]


class Constant:
    """A schedule of rho in the form that GSAM of pytorch_optimizer takes."""

    def step(self):
        return RHO


def _gsam(params):
    base = torch.optim.SGD(params, lr=RATE, momentum=MOMENTUM)
    return peers.GSAM(
        params,
        base_optimizer=base,
        model=torch.nn.Identity(),
        rho_scheduler=Constant(),
        alpha=0.4,
    )


def _wrapper(name, **options):
    def make(params):
        return getattr(peers, name)(
            params, torch.optim.SGD, rho=RHO, lr=RATE, momentum=MOMENTUM, **options
        )

    return make


class _MovedSGD(torch.optim.SGD):
    """SGD of PyTorch with gradients at parameters moved by ``step_of(optimizer)``."""

    def __init__(self, params, step_of):
        super().__init__(params, lr=RATE, momentum=MOMENTUM)
        self.step_of = step_of

    def step(self, closure):
        params = self.param_groups[0]["params"]
        with torch.no_grad():
            start, steps = [p.clone() for p in params], self.step_of(self, params)
            for p, e in zip(params, steps, strict=True):
                p.add_(e)
            closure()
            for p, s in zip(params, start, strict=True):
                p.copy_(s)
        return super().step()


def _of_length(vectors, length):
    norm = torch.sqrt(sum((v**2).sum() for v in vectors))
    return [length * v / norm if norm > 0 else v for v in vectors]


def _momentum_sam(params):
    """Momentum-SAM: back along the momentum that PyTorch's SGD holds."""

    def step_of(optimizer, params):
        momentum = [
            optimizer.state[p].get("momentum_buffer", torch.zeros_like(p))
            for p in params
        ]
        return _of_length(momentum, -RHO)

    return _MovedSGD(params, step_of)


def _preconditioned_sam(params):
    """SAM along what PyTorch's Adam makes of the gradient, which the loop leaves in .grad."""
    copies = [torch.nn.Parameter(torch.zeros_like(p)) for p in params]
    adam = torch.optim.Adam(copies, lr=1.0)

    def step_of(optimizer, params):
        for copy, p in zip(copies, params, strict=True):
            copy.grad, copy.data = p.grad.clone(), torch.zeros_like(copy)
        adam.step()
        return _of_length([-copy.detach() for copy in copies], RHO)

    return _MovedSGD(params, step_of)


@pytest.mark.parametrize(
    ("link", "make"),
    [
        (lambda: flatopt.momentum_sam_gradients(RHO, MOMENTUM), _momentum_sam),
        (
            lambda: flatopt.sam_gradients(RHO, optax.scale_by_adam()),
            _preconditioned_sam,
        ),
    ],
    ids=["momentum_sam", "preconditioned_sam"],
)
def test_trajectories_equal_those_of_pytorch(link, make, x64, standard_promotion):
    start, _, _ = _network(False)
    for a, b, c in zip(_ours(link(), False), _theirs(make, False), start, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)
        assert np.abs(a - c).max() > 1e-2


@pytest.mark.parametrize(
    ("link", "make", "single"),
    [
        (lambda: flatopt.sam_gradients(RHO), _wrapper("SAM"), False),
        (
            lambda: flatopt.asam_gradients(RHO, 0.0),
            _wrapper("SAM", adaptive=True),
            False,
        ),
        (lambda: flatopt.gsam_gradients(RHO, 0.4), _gsam, False),
        # Its LookSAM takes norms leaf by leaf, the paper's and ours over all leaves.
        (
            lambda: flatopt.look_sam_gradients(RHO, every=3, alpha=0.7),
            _wrapper("LookSAM", k=3, alpha=0.7),
            True,
        ),
        (
            lambda: flatopt.friendly_sam_gradients(RHO, 0.8, 0.6),
            _wrapper("FriendlySAM", sigma=0.8, lmbda=0.6),
            False,
        ),
    ],
    ids=["sam", "asam", "gsam", "look_sam", "friendly_sam"],
)
def test_trajectories_equal_those_of_pytorch_optimizer(link, make, single, x64):
    ours, theirs = _ours(link(), single), _theirs(make, single)
    start, _, _ = _network(single)
    for a, b, c in zip(ours, theirs, start, strict=True):
        # All in float64 but for its norm of gradients; its LookSAM adds 1e-8 to norms.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        assert np.abs(a - c).max() > 1e-2
