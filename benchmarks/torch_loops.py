"""PyTorch loops of plain SGD, LPF-SGD and SAM on the same networks, on CPU.

Run as ``python -m benchmarks.torch_loops NAME REPEATS``: prints JSON of step times in
seconds. The loops are what one would write: perturb in place, take the gradient, restore.
"""

import json
import os
import sys
import time

import torch
from torch import nn

CHUNKS, SCALE, RADIUS, BATCH = 8, 5e-4, 0.05, 64


def mlp():
    widths = (24 * 24 * 3, 1024, 1024, 1024)
    layers = [nn.Flatten()]
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


def cnn():
    channels = (3, 32, 64, 128, 144)
    layers = []
    for i, (a, b) in enumerate(zip(channels, channels[1:], strict=False)):
        stride = 1 + (i in (1, 2))
        layers += [
            nn.Conv2d(a, b, 3, stride=stride, padding=1),
            nn.GroupNorm(8, b),
            nn.ReLU(),
        ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(144, 10)
    )


def words():
    layers = [nn.Embedding(50_000, 32)]
    for _ in range(2):
        layers += [nn.Linear(32, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 50_000))


def filter_norms(parameters):
    for p in parameters:
        if p.ndim > 1:
            norm = p.flatten(1).norm(dim=1)
            yield norm.reshape(-1, *[1] * (p.ndim - 1))
        else:
            yield p.norm()


def make_steps(model, images, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    parameters = list(model.parameters())
    loss_fn = nn.CrossEntropyLoss()

    def plain():
        optimizer.zero_grad()
        loss_fn(model(images), labels).backward()
        optimizer.step()

    def chunks():
        optimizer.zero_grad()
        for x, y in zip(images.chunk(CHUNKS), labels.chunk(CHUNKS), strict=True):
            (loss_fn(model(x), y) / CHUNKS).backward()
        optimizer.step()

    def lpf_sgd():
        optimizer.zero_grad()
        for x, y in zip(images.chunk(CHUNKS), labels.chunk(CHUNKS), strict=True):
            with torch.no_grad():
                noise = [
                    SCALE * norm * torch.randn_like(p)
                    for p, norm in zip(
                        parameters, filter_norms(parameters), strict=True
                    )
                ]
                for p, u in zip(parameters, noise, strict=True):
                    p.add_(u)
            (loss_fn(model(x), y) / CHUNKS).backward()
            with torch.no_grad():
                for p, u in zip(parameters, noise, strict=True):
                    p.sub_(u)
        optimizer.step()

    def sam():
        optimizer.zero_grad()
        loss_fn(model(images), labels).backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            steps = [RADIUS * p.grad / (norm + 1e-12) for p in parameters]
            for p, e in zip(parameters, steps, strict=True):
                p.add_(e)
        optimizer.zero_grad()
        loss_fn(model(images), labels).backward()
        with torch.no_grad():
            for p, e in zip(parameters, steps, strict=True):
                p.sub_(e)
        optimizer.step()

    return {"plain": plain, "no noise": chunks, "LPF-SGD": lpf_sgd, "SAM": sam}


def main(name, repeats):
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    model = {"mlp": mlp, "cnn": cnn}[name]()
    steps = make_steps(
        model, torch.randn(BATCH, 3, 24, 24), torch.randint(10, (BATCH,))
    )
    times = {contender: [] for contender in steps}
    for repeat in range(repeats + 2):
        for contender, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= 2:
                times[contender].append(time.perf_counter() - start)
    print(json.dumps({"version": torch.__version__, "times": times}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
