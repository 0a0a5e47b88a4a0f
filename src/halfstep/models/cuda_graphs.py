"""Cheap passes on a GPU: CUDA graphs for small batches."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from halfstep.diffusion.contracts import Where

# Passes before a capture, in which libraries create their handles, choose their kernels and
# allocate their workspaces.
WARM_UP = 2

Captured = tuple[Tensor, Tensor | None, Callable[[], None], Tensor]
"""A graph: its inputs (ids, noise levels or None), its replay, and its output (features)."""


class GraphedNetwork:
    """A network whose passes over small batches replay a CUDA graph.

    `network(x[B, L], sigma[B] or None, where) -> h[B, L, D] or h[N, D]`, with one graph per bucket
    of texts.

    A bucket is a power of two. A pass of B texts runs in the smallest bucket that holds them; the
    rows beyond B hold texts of earlier passes, which no other row reads. A graph is captured when
    first needed. Weights may change in place, but not move.

    Not replayed are passes with gradients or dropout, passes on other devices, and passes of more
    than TOKENS tokens, whose computation takes longer than their launches (and the padding would be
    computed too).
    """

    DEVICE, TOKENS = "cuda", 1 << 13  # eight texts of 1,024 tokens

    def __init__(self, network: nn.Module):
        self.network = network
        self.captured: dict[tuple[object, ...], Captured] = {}

    def __call__(self, x: Tensor, sigma: Tensor | None = None, where: Where = None) -> Tensor:
        (B, L), device = x.shape, x.device.type
        bucket = 1 << max(0, B - 1).bit_length()
        is_small = bucket * L <= self.TOKENS
        is_inference = not torch.is_grad_enabled() and not self.network.training
        if device != self.DEVICE or not is_inference or not is_small:
            return self.network(x, sigma, where)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = bucket, L, None if sigma is None else sigma.dtype, dtype
        if key not in self.captured:
            self.captured[key] = self._capture(bucket, x, sigma, dtype)
        texts, levels, replay, h = self.captured[key]
        texts[:B] = x
        if levels is not None and sigma is not None:
            levels[:B] = sigma
        replay()
        # A copy, not a view: the next replay overwrites h.
        return h[:B].clone() if where is None else h[:B][where]

    def _capture(
        self, bucket: int, x: Tensor, sigma: Tensor | None, dtype: torch.dtype | None
    ) -> Captured:
        """Capture a pass over `bucket` texts."""
        # Tensors created in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            texts = x.new_zeros(bucket, x.shape[1])
            levels = None if sigma is None else sigma.new_zeros(bucket)

            def run() -> Tensor:
                # No autocast cache: a cached cast would be allocated in the graph's memory.
                with torch.autocast(
                    x.device.type, dtype, enabled=dtype is not None, cache_enabled=False
                ):
                    return self.network(texts, levels)

            return texts, levels, *capture_graph(run, x.device)


def capture_graph(
    run: Callable[[], Tensor], device: torch.device
) -> tuple[Callable[[], None], Tensor]:
    """Capture the kernels of run() as one CUDA graph.

    Returns its replay, and the tensor to which each replay writes the value of run().
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: calls of other threads (NCCL's watchdog) do not end the capture.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            value = run()
    return graph.replay, value
