"""Delegates that the wheel can lower to on any machine and run on none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorgnette.targets.executorch.model import Delegate

if TYPE_CHECKING:
    from executorch.exir.backend.partitioner import Partitioner
    from torch import nn

KEPT_ON_CPU = ["aten._to_copy.default", "aten.alias_copy.default"]
"""What Core ML does not get: it has no tensors of bytes, which pixels are first."""


def coreml_delegates(*, float32: bool) -> Mapping[str, Delegate]:
    """The vision encoder for Core ML, in float32 or float16; XNNPACK has the rest."""

    def make(module: nn.Module) -> Partitioner:
        import coremltools
        from executorch.backends.apple.coreml.compiler import CoreMLBackend
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner

        precision = coremltools.precision.FLOAT32 if float32 else coremltools.precision.FLOAT16
        specs = CoreMLBackend.generate_compile_specs(
            compute_precision=precision, minimum_deployment_target=coremltools.target.iOS18
        )
        return CoreMLPartitioner(
            compile_specs=specs,
            take_over_mutable_buffer=False,
            skip_ops_for_coreml_delegation=KEPT_ON_CPU,
        )

    # Core ML normalises by itself; norms in steps break one of its own passes.
    return {"vision_encoder": Delegate(make, norms=False, talks=True)}


def vulkan_delegates() -> Mapping[str, Delegate]:
    """Every component for a GPU with Vulkan."""

    def make(module: nn.Module) -> Partitioner:
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

        return VulkanPartitioner()

    return {name: Delegate(make) for name in ("vision_encoder", "token_embedding", "decoder")}
