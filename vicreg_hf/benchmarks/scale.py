"""Step time on many GPUs, predicted from counted arithmetic and stated assumptions.

Nothing here is measured. A step is the arithmetic of backbone, expander and loss, the optimiser's
memory traffic, and the communication that does not hide behind the backward pass; views are made
meanwhile, and the slower of both counts.

Shapes: N images in all, W GPUs, n = N / W images each, D embedding dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from vicreg_hf.benchmarks.measuring import table
from vicreg_hf.configuration_vicreg import VICRegConfig
from vicreg_hf.loss.covariance import prefers_gram
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.checks import read_widths

FLOAT32, BFLOAT16 = 4, 2
"""Bytes of a weight, a gradient or an entry of the loss's matrices, and of one of an embedding."""
VIEWS, PASSES = 2, 3
"""Views of each image; a backward pass costs two forward ones."""
IMAGENET, EPOCHS = 1_281_167, 100
HEADER = (
    "GPUs,images each,backbone ms,expander,loss,optimizer,communication,input,ms a step,images/s,"
    f"efficiency,hours for {EPOCHS} epochs of ImageNet,with the authors' loss"
).split(",")


def _assumed(default: Any, unit: str, source: str) -> Any:
    return field(default=default, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Machine:
    """Nodes of GPUs, by default DGX H100. Every field is a flag of `benchmark.py scale`."""

    gpus_per_node: int = _assumed(8, "GPUs", "DGX H100 datasheet")
    bf16_tflops: float = _assumed(989.4, "TFLOP/s, peak", "H100 SXM datasheet, dense")
    backbone_share: float = _assumed(
        0.1, "of that peak, in convolutions", "assumed: 4,000 images/s of plain ResNet-50 training"
    )
    expander_share: float = _assumed(0.5, "of that peak, in the expander", "assumed")
    backbone_least_ms: float = _assumed(
        8.0, "milliseconds a step, at least", "assumed: launching the kernels of a ResNet-50"
    )
    loss_tflops: float = _assumed(66.9, "TFLOP/s, peak, in float32", "H100 SXM datasheet")
    authors_loss_tflops: float = _assumed(
        66.9, "TFLOP/s, peak, of the authors' loss", "the same; their float16 autocast has 989.4"
    )
    loss_share: float = _assumed(0.6, "of that peak", "assumed")
    memory_gb_s: float = _assumed(2345.0, "GB/s", "70 % of the datasheet's 3350, assumed")
    optimizer_bytes: float = _assumed(60.0, "bytes a parameter", "assumed: 15 reads and writes")
    nvlink_gb_s: float = _assumed(360.0, "GB/s a GPU, each way", "80 % of the datasheet's 450")
    infiniband_gb_s: float = _assumed(40.0, "GB/s a GPU, each way", "80 % of 400 Gb/s a GPU")
    nvlink_us: float = _assumed(2.0, "microseconds a message", "assumed")
    infiniband_us: float = _assumed(5.0, "microseconds a message", "assumed")
    input_images_s: float = _assumed(37_000.0, "images/s a node", "assumed: 4 GB/s of 108 kB each")

    def gather_seconds(self, size: float, world: int) -> float:
        """An all-gather, after which every GPU holds `size` bytes.

        GPUs of the same place in all nodes gather first, then each node within itself.

        Raises:
            ValueError: nodes that are not full.
        """
        inside = min(world, self.gpus_per_node)
        nodes, rest = divmod(world, inside)
        if rest:
            raise ValueError(
                f"gpus beyond one node must fill nodes, got {world} and gpus_per_node="
                f"{self.gpus_per_node}; use {inside * (nodes + 1)}."
            )
        seconds = size * (inside - 1) / inside / self.nvlink_gb_s
        seconds += size * (nodes - 1) / nodes / inside / self.infiniband_gb_s
        messages = math.log2(inside) * self.nvlink_us + math.log2(nodes) * self.infiniband_us
        return 1e-9 * seconds + 1e-6 * messages

    def reduce_seconds(self, size: float, world: int) -> float:
        """An all-reduce of `size` bytes: a reduce-scatter and an all-gather."""
        return 2 * self.gather_seconds(size, world)


class Work(NamedTuple):
    """The model's share of a step."""

    backbone_flops: int
    """For one view, forward; likewise expander_flops."""
    expander_flops: int
    parameters: int
    norms: int
    """Batch normalisations in backbone and expander."""
    dim: int


def count_work(architecture: str, image_size: int, expander_dims: Sequence[int]) -> Work:
    """Count a model's arithmetic on the meta device, where nothing is computed."""
    with torch.device("meta"):
        config = VICRegConfig(architecture=architecture, expander_dims=list(expander_dims))
        model = VICRegModel(config).eval()
        images = torch.empty(1, 3, image_size, image_size)
        features = torch.empty(1, model.num_features)
    flops = []
    for module, inputs in ((model.backbone, images), (model.expander, features)):
        with FlopCounterMode(display=False) as counter:
            module(inputs)
        flops.append(counter.get_total_flops())
    return Work(
        *flops,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        norms=sum(isinstance(module, _BatchNorm) for module in model.modules()),
        dim=expander_dims[-1] if expander_dims else model.num_features,
    )


def loss_seconds(
    machine: Machine, batch_size: int, dim: int, world: int, *, authors: bool
) -> tuple[float, float]:
    """Seconds of the loss's arithmetic and of its communication, both branches together.

    Each process of ours forms its own rows of the cheaper product; each process of the authors'
    forms the whole covariance matrix, and the gradient of all rows is summed.
    """
    own, embeddings = batch_size / world, batch_size * dim * BFLOAT16
    if authors:
        rate = machine.authors_loss_tflops * machine.loss_share * 1e12
        sent = machine.gather_seconds(embeddings, world) + machine.reduce_seconds(embeddings, world)
        return 2 * 6 * batch_size * dim * dim / rate, 2 * sent
    rate = machine.loss_tflops * machine.loss_share * 1e12
    if prefers_gram(batch_size, dim):  # the product, and its use in the gradient
        sent = machine.gather_seconds(2 * embeddings, world)
        return 2 * 4 * own * batch_size * dim / rate, sent
    sent = machine.reduce_seconds(FLOAT32 * dim * dim, world)
    return 2 * 4 * own * dim * dim / rate, 2 * sent


def predict(
    work: Work, machine: Machine, world: int, batch_size: int, *, authors: bool = False
) -> dict[str, float]:
    """Seconds of a step's parts, and of the whole step as `step`.

    Args:
        world: W.
        batch_size: N.
        authors: with the authors' formula of the loss.

    Raises:
        ValueError: a batch that the GPUs cannot share evenly.
    """
    if batch_size % world or batch_size < 2 * world:
        nearest = max(2, round(batch_size / world)) * world
        raise ValueError(
            "batch_size must give every GPU as many images and at least 2, got "
            f"batch_size={batch_size} for {world} GPUs; the nearest is {nearest}."
        )
    views = batch_size / world * VIEWS * PASSES
    peak = machine.bf16_tflops * 1e12
    arithmetic = views * work.backbone_flops / (peak * machine.backbone_share)
    backbone = max(arithmetic, 1e-3 * machine.backbone_least_ms)
    loss, communication = loss_seconds(machine, batch_size, work.dim, world, authors=authors)
    if world > 1:
        messages = 2 * VIEWS * work.norms  # SyncBatchNorm's, forward and backward
        communication += messages * machine.reduce_seconds(0, world)
        # gradients are summed while the backbone's backward pass, two thirds of it, goes on
        gradients = machine.reduce_seconds(FLOAT32 * work.parameters, world)
        communication += max(0.0, gradients - backbone * 2 / 3)
    parts = {
        "backbone": backbone,
        "expander": views * work.expander_flops / (peak * machine.expander_share),
        "loss": loss,
        "optimizer": work.parameters * machine.optimizer_bytes / machine.memory_gb_s * 1e-9,
        "communication": communication if world > 1 else 0.0,
    }
    inputs = batch_size * machine.gpus_per_node / machine.input_images_s / world
    return parts | {"input": inputs, "step": max(sum(parts.values()), inputs)}


def scale(
    machine: Machine,
    architecture: str,
    *,
    image_size: int,
    batch_size: int,
    expander_dims: str | Sequence[int],
    gpus: Sequence[int],
    weak: bool = False,
) -> str:
    """The prediction, what it counts and what it assumes, as tables.

    Args:
        gpus: numbers of GPUs.
        weak: keep the images of each GPU, of which the first of `gpus` have `batch_size`.
    """
    widths = read_widths("expander_dims", expander_dims)
    work = count_work(architecture, image_size, widths)
    rows, alone = [], 0.0
    for world in (1, *gpus):
        size = batch_size * world // gpus[0] if weak else batch_size
        ours = predict(work, machine, world, size)
        rate = size / ours["step"]
        alone = alone or rate
        theirs = predict(work, machine, world, size, authors=True)["step"]
        rows.append([
            str(world), str(size // world), *(f"{1000 * part:.2f}" for part in ours.values()),
            f"{rate:.0f}", f"{100 * rate / alone / world:.1f} %",
            f"{IMAGENET * EPOCHS / rate / 3600:.2f}", f"{theirs / ours['step']:.2f} x",
        ])  # fmt: skip
    assumptions = [
        [each.name, str(value), each.metadata["unit"],
         each.metadata["source"] if value == each.default else "given"]
        for each in fields(machine)
        for value in [getattr(machine, each.name)]
    ]  # fmt: skip
    lines = [
        f"{architecture} at {image_size} pixels: {work.backbone_flops / 1e9:.2f} GFLOP a view "
        f"forward; expander {'-'.join(map(str, widths))}: "
        f"{work.expander_flops / 1e9:.2f} GFLOP; {work.parameters / 1e6:.1f} million parameters, "
        f"{work.norms} batch normalisations; {'images of each GPU' if weak else 'global batch'} "
        "fixed. Predicted, not measured:",
        "", table(HEADER, rows[1:]), "", "Assumed:", "",
        table(["", "value", "unit", "source"], assumptions),
    ]  # fmt: skip
    return "\n".join(lines)
