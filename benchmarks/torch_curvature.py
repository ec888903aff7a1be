"""curvlinops and PyHessian on a network and batch saved by ``benchmarks.curvature``.

Run as ``python -m benchmarks.torch_curvature NAME FILE REPEATS``: prints JSON of times in
seconds for one product each, and of traces.
"""

import importlib.metadata
import json
import os
import sys
import time

import numpy as np
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator, hutchinson_trace
from torch import nn

from benchmarks.torch_loops import cnn, mlp, words

PROBES = 8


class GroupNorm(nn.Module):
    """GroupNorm from elementary operations: PyTorch's own has no second derivative here."""

    def __init__(self, layer):
        super().__init__()
        self.groups, self.weight, self.bias = layer.num_groups, layer.weight, layer.bias

    def forward(self, x):
        grouped = x.reshape(len(x), self.groups, -1)
        mean = grouped.mean(dim=2, keepdim=True)
        variance = (grouped - mean).square().mean(dim=2, keepdim=True)
        normal = ((grouped - mean) * (variance + 1e-6).rsqrt()).reshape(x.shape)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


def load(name, path):
    """The network with the saved weights, and the batch."""
    saved = np.load(path)
    model = {"mlp": mlp, "cnn": cnn, "words": words}[name]()
    layers = [m for m in model if hasattr(m, "weight")]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            weight = torch.tensor(saved[f"weight{index}"])
            if isinstance(layer, nn.Linear):
                weight = weight.T
            elif isinstance(layer, nn.Conv2d):
                weight = weight.permute(3, 2, 0, 1)
            layer.weight.copy_(weight)
            if not isinstance(layer, nn.Embedding):
                layer.bias.copy_(torch.tensor(saved[f"bias{index}"]))
    model = nn.Sequential(
        *[GroupNorm(m) if isinstance(m, nn.GroupNorm) else m for m in model]
    )
    inputs = torch.tensor(saved["inputs"])
    if name == "cnn":
        inputs = inputs.permute(0, 3, 1, 2).contiguous()
    if name == "words":
        inputs = inputs.long()
    return model, inputs, torch.tensor(saved["labels"], dtype=torch.long)


def main(name, path, repeats):
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    model, inputs, labels = load(name, path)
    loss_fn = nn.CrossEntropyLoss()
    parameters = list(model.parameters())
    data = [(inputs, labels)]
    options = {"check_deterministic": False}
    hessian = HessianLinearOperator(model, loss_fn, parameters, data, **options)
    newton = GGNLinearOperator(model, loss_fn, parameters, data, **options)
    size = hessian.shape[1]

    def gradient():
        return torch.autograd.grad(loss_fn(model(inputs), labels), parameters)

    from pyhessian import hessian as PyHessian  # noqa: N812, its use of torch warns

    def pyhessian_trace():
        operator = PyHessian(model, loss_fn, data=(inputs, labels), cuda=False)
        return operator.trace(maxIter=PROBES, tol=-float("inf"))  # never stop early

    vector = torch.randn(size)
    block = torch.randint(0, 2, (size, PROBES)).float() * 2 - 1
    contenders = {
        "gradient": (gradient, 1),
        "curvlinops, Hessian": (lambda: hessian @ vector, 1),
        "curvlinops, Hessian, 8 vectors": (lambda: hessian @ block, PROBES),
        "curvlinops, Gauss-Newton": (lambda: newton @ vector, 1),
        "curvlinops, Gauss-Newton, 8 vectors": (lambda: newton @ block, PROBES),
        "curvlinops, trace": (lambda: hutchinson_trace(hessian, PROBES), PROBES),
        "PyHessian, trace": (pyhessian_trace, PROBES),
    }
    times = {contender: [] for contender in contenders}
    for repeat in range(repeats + 1):
        for contender, (run, count) in contenders.items():
            start = time.perf_counter()
            run()
            if repeat:
                times[contender].append((time.perf_counter() - start) / count)
    loss = loss_fn(model(inputs), labels).item()
    packages = ("torch", "curvlinops-for-pytorch", "PyHessian")
    versions = {package: importlib.metadata.version(package) for package in packages}
    print(json.dumps({"versions": versions, "times": times, "loss": loss}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
