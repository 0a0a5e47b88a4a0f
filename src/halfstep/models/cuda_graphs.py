"""A network's pass at its least cost on a GPU: few texts as a CUDA graph, launched once for all kernels; matrices in the compute dtype."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from halfstep.diffusion.contracts import Where

WARM_UP = 2  # passes before a capture: libraries make their handles, choose their kernels and take their workspaces in them


class GraphedNetwork:
    """`network(x[B, L], sigma[B] or None, where) -> h[B, L, D] or h[N, D]`, replayed from a CUDA graph, captured at first need for each bucket of texts.

    A bucket is a power of two; a pass of B texts runs in the smallest one that holds them, over what earlier passes left in the rows beyond B,
    which no row of a text reads. Weights may change in place, but not move. Passes that want a gradient or dropout, or are not on CUDA, are not
    replayed; nor those of more than TOKENS tokens: what they compute takes longer than what they launch, and padding would be computed too.
    """

    DEVICE, TOKENS = "cuda", 1 << 13  # eight texts of 1,024 tokens

    def __init__(self, network: nn.Module):
        self.network = network
        self.captured: dict[tuple, tuple[Tensor, Tensor | None, Callable[[], None], Tensor]] = {}

    def __call__(self, x: Tensor, sigma: Tensor | None = None, where: Where = None) -> Tensor:
        (B, L), device = x.shape, x.device.type
        bucket = 1 << max(0, B - 1).bit_length()
        if (
            device != self.DEVICE
            or torch.is_grad_enabled()
            or self.network.training
            or bucket * L > self.TOKENS
        ):
            return self.network(x, sigma, where)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = bucket, L, None if sigma is None else sigma.dtype, dtype
        if key not in self.captured:
            self.captured[key] = self._capture(bucket, x, sigma, dtype)
        texts, levels, replay, h = self.captured[key]
        texts[:B] = x
        if sigma is not None:
            levels[:B] = sigma
        replay()
        return (
            h[:B].clone() if where is None else h[:B][where]
        )  # no view: the next replay writes over h

    def _capture(
        self, bucket: int, x: Tensor, sigma: Tensor | None, dtype: torch.dtype | None
    ) -> tuple:
        """Memory that the graph reads (ids, noise levels), its replay, and memory that it writes (features)."""
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # memory of inference mode could not be written to outside of it
            texts = x.new_zeros(bucket, x.shape[1])
            levels = None if sigma is None else sigma.new_zeros(bucket)

            def run() -> Tensor:
                with torch.autocast(
                    x.device.type, dtype, enabled=dtype is not None, cache_enabled=False
                ):  # a kept cast would lie in the graph's memory
                    return self.network(texts, levels)

            return texts, levels, *capture_graph(run, x.device)


def capture_graph(
    run: Callable[[], Tensor], device: torch.device
) -> tuple[Callable[[], None], Tensor]:
    """The kernels of run() as one CUDA graph: its replay, and where each replay writes run's value."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, stream=side, capture_error_mode="thread_local"
        ):  # another thread's calls (NCCL's watchdog) break nothing
            value = run()
    return graph.replay, value


def cast_matrices(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Matrices and biases in `dtype`, in place: what autocast to `dtype` makes of them in every pass, bit for bit. Norms, tables, adaLN and readout,
    which are float32 inside autocast too, stay so."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(
            ("adaLN_modulation", "output_layer.linear")
        ):
            module.to(dtype)
    return network
