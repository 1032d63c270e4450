"""Record work on a GPU once and replay it, so that the GPU never waits for Python."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Recording = tuple[torch.cuda.CUDAGraph, Sequence[Tensor], Sequence[Tensor]]
"""A CUDA graph, and the inputs and outputs in the memory that it reads and writes."""


class Graphs:
    """A function of tensors as CUDA graphs, one for all calls with the same shapes.

    The first call with new shapes runs the function, in which libraries and optimizers allocate
    what they need; the second records it; it and all later ones replay the recording. So there
    should be few different shapes.

    Args:
        function: From tensors to tensors. It may read other tensors and change them in place, but
            must do the same whenever the shapes are the same, and must not wait for the GPU.
        device: The GPU.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], device: torch.device) -> None:
        self.function = function
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.recordings: dict[tuple[torch.Size, ...], Recording | None] = {}

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The result of the function; the next call may overwrite it."""
        shapes = tuple(one.shape for one in inputs)
        if shapes not in self.recordings:
            self.recordings[shapes] = None
            return self.run(inputs)
        recording = self.recordings[shapes] or self.record(inputs)
        self.recordings[shapes] = recording
        graph, kept, outputs = recording
        for old, new in zip(kept, inputs, strict=True):
            old.copy_(new)
        graph.replay()
        return outputs

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Call the function on the stream that will record it."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        return outputs

    def record(self, inputs: Sequence[Tensor]) -> Recording:
        """Record what the function does, without running it."""
        graph, kept = torch.cuda.CUDAGraph(), [one.clone() for one in inputs]
        # One memory pool: no two recordings run at a time, and none reads another's results.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            outputs = self.function(*kept)
        return graph, kept, outputs
