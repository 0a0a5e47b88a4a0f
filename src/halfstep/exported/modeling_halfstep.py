"""A masked diffusion language model (MDLM, arXiv 2406.07524), distilled by SDTT (arXiv 2410.21035), for transformers; halfstep is not needed.

    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    ids = model.sample(num_samples=4, steps=8)        # [4, model.config.model_length]

Apache-2.0, the halfstep authors.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class HalfstepConfig(PretrainedConfig):
    model_type = "halfstep"

    def __init__(
        self,
        vocab_size=50258,
        hidden_dim=768,
        n_blocks=12,
        n_heads=12,
        cond_dim=128,
        model_length=1024,
        time_conditioning=False,
        steps=1024,
        **more,
    ):
        super().__init__(**more)
        self.vocab_size, self.hidden_dim, self.n_blocks, self.n_heads = (
            vocab_size,
            hidden_dim,
            n_blocks,
            n_heads,
        )
        self.cond_dim, self.model_length, self.time_conditioning, self.steps = (
            cond_dim,
            model_length,
            time_conditioning,
            steps,
        )
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
        angles = sigma.float()[:, None] * 1e4 ** -(
            torch.arange(128, device=sigma.device, dtype=torch.float32) / 128
        )
        return F.silu(self.mlp(torch.cat([angles.cos(), angles.sin()], -1)))


class Rotary(nn.Module):
    def __init__(self, head_width):
        super().__init__()
        self.head_width = head_width
        self.register_buffer(
            "inv_freq", 1e4 ** -(torch.arange(0, head_width, 2).float() / head_width)
        )

    def forward(self, x):
        angles = torch.outer(
            torch.arange(x.shape[-2], device=x.device).to(self.inv_freq.dtype), self.inv_freq
        )
        angles = torch.cat([angles, angles], -1)
        half = self.head_width // 2
        return (
            x * angles.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angles.sin()
        ).to(x.dtype)


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
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(cond)[
            :, None
        ].chunk(6, -1)
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
        self.blocks = nn.ModuleList(
            Block(config.hidden_dim, config.n_heads, config.cond_dim)
            for _ in range(config.n_blocks)
        )
        self.output_layer = Head(config.hidden_dim, config.vocab_size, config.cond_dim)

    def forward(self, x, sigma):
        cond = self.sigma_map(sigma)
        h = F.embedding(x, self.vocab_embed.embedding)
        for block in self.blocks:
            h = block(h, self.rotary_emb, cond)
        return self.output_layer(h, cond)


class HalfstepForMaskedLM(PreTrainedModel):
    """logits are log p(x0 | xt): no mass on the mask token, and visible tokens stay as they are (SUBS)."""

    config_class = HalfstepConfig
    base_model_prefix = "backbone"

    def __init__(self, config):
        super().__init__(config)
        self.backbone = DiT(config)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, labels=None, t=None, return_dict=True, **unused):
        """input_ids[B, L] with mask_token_id where text is wanted; t[B] in (0, 1] for a network that knows the time. labels: -100 is ignored."""
        if self.config.time_conditioning and t is None:
            raise ValueError(
                "this network knows the time: give t[B], the share of masked tokens that was drawn"
            )
        sigma = (
            -torch.log1p(-(1 - 1e-3) * t)
            if self.config.time_conditioning
            else torch.zeros(1, device=input_ids.device)
        )
        mask = self.config.mask_token_id
        logits = self.backbone(input_ids, sigma).float()
        logits[..., mask] = -torch.inf
        log_p = logits.log_softmax(-1)
        kept = torch.full_like(log_p, -torch.inf).scatter_(-1, input_ids[..., None], 0.0)
        log_p = torch.where((input_ids == mask)[..., None], log_p, kept)
        loss = (
            None
            if labels is None
            else F.nll_loss(log_p.flatten(0, 1), labels.flatten(), ignore_index=-100)
        )
        return MaskedLMOutput(loss=loss, logits=log_p) if return_dict else (loss, log_p)

    @torch.no_grad()
    def sample(self, num_samples=1, steps=None, length=None, input_ids=None, generator=None):
        """Ancestral sampling in `steps` passes, [num_samples, length] ids; input_ids[num_samples, length] fixes all that is not masked."""
        steps, mask, device = steps or self.config.steps, self.config.mask_token_id, self.device
        x = (
            torch.full((num_samples, length or self.config.model_length), mask, device=device)
            if input_ids is None
            else input_ids.clone()
        )
        for i in range(steps):
            t, s = 1 - i / steps, 1 - (i + 1) / steps
            u = torch.rand(x.shape, generator=generator, device=device, dtype=torch.float64)
            reveal = (x == mask) & (u < (t - s) / t) if i < steps - 1 else x == mask
            if reveal.any():
                p = self(x, t=torch.full((len(x),), t, device=device)).logits[reveal].double().exp()
                cdf = p.cumsum(-1)
                u = torch.rand(len(p), 1, generator=generator, device=device, dtype=torch.float64)
                x[reveal] = (cdf <= u * cdf[:, -1:]).sum(-1).clamp(max=mask - 1)
        return x
