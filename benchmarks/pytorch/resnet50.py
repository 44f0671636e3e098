"""Train a ResNet-50 of the zoo in PyTorch: DataLoader, autocast, channels-last, optionally torch.compile.

    python benchmarks/pytorch/resnet50.py --data IMAGENET/train --batch-size 32 --precision bfloat16 --steps 20

Without --data it trains on the embedded digits. Prints images/s (median and quartiles), loss, time to the first step and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import triptych
from triptych.bench import script


class Augmented(Dataset[tuple[torch.Tensor, int]]):
    """ImageNet's usual training transforms."""

    def __init__(self, images: script.Images, size: int) -> None:
        self.images = images
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomResizedCrop(size, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(script.MEAN, script.STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), label


def batches(loader: DataLoader[Any]) -> Any:
    """Epoch after epoch."""
    while True:
        yield from loader


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train for a few steps."""
    given = script.options(__doc__ or "", arguments)
    torch.manual_seed(0)
    model = triptych.create_model(given.model, framework="pytorch", image_size=given.image_size).native
    device = next(model.parameters()).device
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), given.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-5)
    dataset = Augmented(given.images, given.image_size)
    loader = DataLoader(
        dataset, given.batch_size, shuffle=True, drop_last=True, num_workers=given.workers, pin_memory=device.type == "cuda",
        persistent_workers=given.workers > 0,
    )  # fmt: skip
    forward = torch.compile(model) if given.compile else model

    progress, made = script.Progress(given, "pytorch"), batches(loader)
    for _ in range(given.steps):
        images, labels = next(made)
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bfloat16"):
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        progress.step(loss.item())
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return progress.finish(device.type, memory)


if __name__ == "__main__":
    main()
