"""A masked diffusion language model for transformers; the package halfstep is not needed.

The model is an MDLM (arXiv 2406.07524), distilled by SDTT (arXiv 2410.21035).

    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    ids = model.sample(num_samples=4, steps=8)        # [4, model.config.model_length]

Apache-2.0, the halfstep authors.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

EPS = 1e-3  # share of visible tokens at t = 1
SHARES = {  # noise schedule -> (1 - alpha(t)) / (1 - EPS), the share of masked tokens at time t
    "loglinear": lambda t: t,
    "cosine": lambda t: torch.sin(math.pi / 2 * t),
}


class HalfstepConfig(PretrainedConfig):
    """Shape of the network, and the number of sampling steps that it was trained for (steps)."""

    model_type = "halfstep"

    def __init__(
        self,
        vocab_size: int = 50258,  # with the mask token, which is the last
        hidden_dim: int = 768,
        n_blocks: int = 12,
        n_heads: int = 12,
        cond_dim: int = 128,
        model_length: int = 1024,
        time_conditioning: bool = False,
        schedule: str = "loglinear",
        steps: int = 1024,
        **more,
    ):
        super().__init__(**more)
        self.vocab_size = vocab_size
        self.hidden_dim = hidden_dim
        self.n_blocks = n_blocks
        self.n_heads = n_heads
        self.cond_dim = cond_dim
        self.model_length = model_length
        self.time_conditioning = time_conditioning
        self.schedule = schedule
        self.steps = steps
        self.mask_token_id = vocab_size - 1


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.layer_norm(x.float(), x.shape[-1:], self.weight, eps=1e-5)


class Embedding(nn.Module):
    def __init__(self, vocabulary, width):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocabulary, width))


class TimeEmbedding(nn.Module):
    def __init__(self, cond_dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma):
        powers = torch.arange(128, device=sigma.device, dtype=torch.float32) / 128
        angles = sigma.float()[:, None] * 1e4**-powers
        return F.silu(self.mlp(torch.cat([angles.cos(), angles.sin()], -1)))


class Rotary(nn.Module):
    def __init__(self, head_width):
        super().__init__()
        self.head_width = head_width
        powers = torch.arange(0, head_width, 2).float() / head_width
        self.register_buffer("inv_freq", 1e4**-powers)

    def forward(self, x):
        positions = torch.arange(x.shape[-2], device=x.device).to(self.inv_freq.dtype)
        angles = torch.outer(positions, self.inv_freq)
        angles = torch.cat([angles, angles], -1)
        half = self.head_width // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return (x * angles.cos() + turned * angles.sin()).to(x.dtype)


class Block(nn.Module):
    def __init__(self, width, heads, cond_dim):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.adaLN_modulation = nn.Linear(cond_dim, 6 * width)

    def forward(self, x, rotary, cond):
        modulation = self.adaLN_modulation(cond)[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, -1)
        B, L, D = x.shape
        h = self.norm1(x) * (1 + scale_a) + shift_a
        q, k, v = self.attn_qkv(h).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(rotary(q), rotary(k), v)
        x = x + gate_a * self.attn_out(h.transpose(1, 2).reshape(B, L, D))
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class Head(nn.Module):
    def __init__(self, width, vocabulary, cond_dim):
        super().__init__()
        self.norm_final = Norm(width)
        self.linear = nn.Linear(width, vocabulary)
        self.adaLN_modulation = nn.Linear(cond_dim, 2 * width)

    def forward(self, x, cond):
        shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.vocab_embed = Embedding(config.vocab_size, config.hidden_dim)
        self.sigma_map = TimeEmbedding(config.cond_dim)
        self.rotary_emb = Rotary(config.hidden_dim // config.n_heads)
        block = (config.hidden_dim, config.n_heads, config.cond_dim)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(config.n_blocks))
        self.output_layer = Head(config.hidden_dim, config.vocab_size, config.cond_dim)

    def forward(self, x, sigma):
        cond = self.sigma_map(sigma)
        h = F.embedding(x, self.vocab_embed.embedding)
        for block in self.blocks:
            h = block(h, self.rotary_emb, cond)
        return self.output_layer(h, cond)


class HalfstepForMaskedLM(PreTrainedModel):
    """The denoiser: its logits are log p(x0 | xt), the SUBS parameterization of MDLM.

    The mask token has no probability, and a visible token keeps its value with probability 1.
    """

    config_class = HalfstepConfig
    base_model_prefix = "backbone"

    def __init__(self, config: HalfstepConfig):
        super().__init__(config)
        self.backbone = DiT(config)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        t: Tensor | None = None,
        return_dict: bool = True,
        **unused,
    ) -> MaskedLMOutput | tuple[Tensor | None, Tensor]:
        """Log-probabilities of the clean tokens, [B, L, V], and the mean loss of the labels.

        Args:
            input_ids: [B, L], with mask_token_id where a token is wanted
            labels: [B, L]; -100 is ignored
            t: [B] in (0, 1], the diffusion time; only for networks with time_conditioning
        """
        mask = self.config.mask_token_id
        logits = self.backbone(input_ids, self._sigma(t, input_ids.device)).float()
        logits[..., mask] = -torch.inf
        log_p = logits.log_softmax(-1)
        visible = torch.full_like(log_p, -torch.inf).scatter_(-1, input_ids[..., None], 0.0)
        log_p = torch.where((input_ids == mask)[..., None], log_p, visible)
        loss = None
        if labels is not None:
            loss = F.nll_loss(log_p.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return MaskedLMOutput(loss=loss, logits=log_p) if return_dict else (loss, log_p)

    def _sigma(self, t: Tensor | None, device: torch.device) -> Tensor:
        """Noise level -log alpha(t), [B]; 0 for a network that ignores the time."""
        if not self.config.time_conditioning:
            return torch.zeros(1, device=device)
        if t is None:
            raise ValueError("this network needs the time: pass t[B], between 0 and 1")
        return -torch.log1p(-(1 - EPS) * SHARES[self.config.schedule](t))

    @torch.no_grad()
    def sample(
        self,
        num_samples: int = 1,
        steps: int | None = None,
        length: int | None = None,
        input_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Ancestral sampling in `steps` steps; returns token ids, [num_samples, length].

        Args:
            num_samples: number of texts
            steps: number of steps (default: config.steps)
            length: tokens per text (default: config.model_length)
            input_ids: [num_samples, length]; all tokens that are not masked stay as they are
            generator: source of the random numbers
        """
        steps, mask, device = steps or self.config.steps, self.config.mask_token_id, self.device
        if input_ids is None:
            shape = (num_samples, length or self.config.model_length)
            x = torch.full(shape, mask, device=device)
        else:
            x = input_ids.clone()

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device, dtype=torch.float64)

        share = SHARES[self.config.schedule](
            torch.tensor([1 - i / steps for i in range(steps + 1)], dtype=torch.float64)
        ).tolist()
        for i in range(steps):
            t = 1 - i / steps
            u = uniform(*x.shape)  # drawn in the last step too, which reveals everything
            reveal = x == mask
            if i < steps - 1:
                reveal &= u < (share[i] - share[i + 1]) / share[i]
            if reveal.any():
                log_p = self(x, t=torch.full((len(x),), t, device=device)).logits
                cdf = log_p[reveal].double().exp().cumsum(-1)
                threshold = uniform(len(cdf), 1) * cdf[:, -1:]
                x[reveal] = (cdf <= threshold).sum(-1).clamp(max=mask - 1)
        return x
