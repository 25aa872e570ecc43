"""The assumptions of `scale`: a machine, and what its network takes to send.

Every field is a flag. A source in parentheses, or the word assumed, stands with each.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, fields
from typing import Any

GIGA = 1e9


def _given(default: Any, unit: str, source: str) -> Any:
    return field(default=default, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Machine:
    """Nodes of GPUs; by default those of DGX H100."""

    gpus_per_node: int = _given(8, "GPUs", "DGX H100 datasheet")
    bf16_tflops: float = _given(989.4, "TFLOP/s, peak", "H100 SXM datasheet, dense")
    backbone_share: float = _given(
        0.1, "of that peak, in convolutions", "assumed: 4,000 images/s of plain ResNet-50 training"
    )
    expander_share: float = _given(0.5, "of that peak, in the expander", "assumed")
    loss_tflops: float = _given(
        66.9, "TFLOP/s, peak, of the loss", "H100 SXM datasheet, float32, which torch's default is"
    )
    authors_loss_tflops: float = _given(
        66.9, "TFLOP/s, peak, of the authors' loss", "the same; their float16 autocast has 989.4"
    )
    loss_share: float = _given(0.6, "of that peak, in the loss", "assumed")
    memory_gb_s: float = _given(3350.0, "GB/s, of the GPU's memory", "H100 SXM datasheet")
    memory_share: float = _given(0.7, "of that", "assumed")
    launch_us: float = _given(5.0, "microseconds a kernel, at least", "assumed, without a compiler")
    nvlink_gb_s: float = _given(450.0, "GB/s a GPU, each way", "H100 SXM datasheet: 900 both ways")
    infiniband_gb_s: float = _given(50.0, "GB/s a GPU, each way", "DGX H100: 400 Gb/s a GPU")
    link_share: float = _given(0.8, "of either", "assumed")
    nvlink_us: float = _given(2.0, "microseconds a message", "assumed")
    infiniband_us: float = _given(5.0, "microseconds a message", "assumed")
    embedding_bytes: int = _given(2, "bytes an entry", "bf16 autocast")
    messages_per_norm: int = _given(2, "a view", "torch's SyncBatchNorm: forward and backward")
    overlap: bool = _given(True, "gradients are summed during backward", "DDP's default")
    crop_images_s: float = _given(
        680.0, "images/s a core", "README, Images: decoding and both crops in 1.47 ms"
    )
    cores_per_node: int = _given(112, "cores", "DGX H100 datasheet")
    read_mb_s: float = _given(4000.0, "MB/s a node", "assumed")
    image_kb: float = _given(108.0, "kB an image", "assumed, about ImageNet's")
    checkpoint_mb_s: float = _given(1000.0, "MB/s", "assumed")

    @property
    def backbone_rate(self) -> float:
        """FLOP/s."""
        return self.bf16_tflops * self.backbone_share * 1e12

    @property
    def expander_rate(self) -> float:
        """FLOP/s."""
        return self.bf16_tflops * self.expander_share * 1e12

    @property
    def memory_rate(self) -> float:
        """Bytes/s."""
        return self.memory_gb_s * self.memory_share * GIGA

    def layout(self, world: int) -> tuple[int, int]:
        """GPUs in each node, and nodes.

        Raises:
            ValueError: nodes that are not full.
        """
        if world <= self.gpus_per_node:
            return world, 1
        if world % self.gpus_per_node:
            raise ValueError(
                f"gpus beyond one node must fill nodes, got {world} and gpus_per_node="
                f"{self.gpus_per_node}; use {self.gpus_per_node * -(-world // self.gpus_per_node)}."
            )
        return self.gpus_per_node, world // self.gpus_per_node

    def gather_bytes(self, total: float, world: int) -> tuple[float, float]:
        """What a GPU receives of an all-gather over NVLink, and over InfiniBand.

        First the GPUs of the same place in all nodes gather among themselves, then each node
        within itself. Together that is (W - 1) / W of the total, as in one ring over all.

        Args:
            total: bytes that every GPU then holds.
            world: W.
        """
        inside, nodes = self.layout(world)
        return total * (inside - 1) / inside, total * (nodes - 1) / nodes / inside

    def gather_seconds(self, total: float, world: int) -> float:
        """An all-gather: rings, which send a message to each but one of their members."""
        inside, nodes = self.layout(world)
        messages = (inside - 1) * self.nvlink_us + (nodes - 1) * self.infiniband_us
        return self._sending(*self.gather_bytes(total, world)) + 1e-6 * messages

    def reduce_seconds(self, size: float, world: int) -> float:
        """An all-reduce: a reduce-scatter and an all-gather, with the messages of trees."""
        inside, nodes = self.layout(world)
        messages = _depth(inside) * self.nvlink_us + _depth(nodes) * self.infiniband_us
        nvlink, infiniband = self.gather_bytes(size, world)
        return 2 * (self._sending(nvlink, infiniband) + 1e-6 * messages)

    def _sending(self, nvlink: float, infiniband: float) -> float:
        seconds = nvlink / self.nvlink_gb_s + infiniband / self.infiniband_gb_s
        return seconds / (GIGA * self.link_share)

    def input_rate(self, world: int) -> float:
        """Images/s that the nodes' cores and disks deliver; part of a node has its share."""
        nodes = world / self.gpus_per_node
        reading = 1000 * self.read_mb_s / self.image_kb
        return nodes * min(self.cores_per_node * self.crop_images_s, reading)


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each assumption."""
    for each in fields(Machine):
        text = f"{each.metadata['unit']} (default {each.default}: {each.metadata['source']})"
        options: dict[str, Any] = {"type": type(each.default)}
        if isinstance(each.default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(
            f"--{each.name}", default=each.default, help=text.replace("%", "%%"), **options
        )


def machine_from(args: argparse.Namespace) -> Machine:
    """The machine that the flags describe."""
    return Machine(**{each.name: getattr(args, each.name) for each in fields(Machine)})


def assumptions(machine: Machine) -> list[list[str]]:
    """Of each its name, value, unit and source; a value of the user's own says so."""
    rows = []
    for each in fields(machine):
        value = getattr(machine, each.name)
        source = each.metadata["source"] if value == each.default else "given"
        rows.append([each.name, f"{value}", each.metadata["unit"], source])
    return rows


def _depth(members: int) -> int:
    return math.ceil(math.log2(members))
