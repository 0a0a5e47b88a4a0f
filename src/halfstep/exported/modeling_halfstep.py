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
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

EPS = 1e-3  # share of visible tokens at t = 1
SHARES = {  # noise schedule -> (1 - alpha(t)) / (1 - EPS), the share of masked tokens at time t
    "loglinear": lambda t: t,
    "cosine": lambda t: torch.sin(math.pi / 2 * t),
}
TIMES = {  # the inverse: the time t at which this share of the tokens is masked
    "loglinear": lambda share: share,
    "cosine": lambda share: 2 / math.pi * torch.asin(share),
}


class HalfstepConfig(PretrainedConfig):
    """Shape of the network, and the number of sampling steps that it was trained for (steps)."""

    model_type = "halfstep"
    attribute_map = {  # noqa: RUF012  (transformers' idiom)
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "model_length",
    }

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
        shifted: bool = False,  # the output at position i - 1 predicts the token at i
        architecture: str = "dit",  # or gpt2
        **more,
    ):
        mask = more.pop("mask_token_id", None)
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
        self.shifted = shifted
        self.architecture = architecture
        self.tie_word_embeddings = False
        for name in ("vocab_size", "hidden_dim", "n_blocks", "n_heads", "cond_dim", "model_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: found {value!r}, expected a whole number from 1")
        self.mask_token_id = vocab_size - 1
        if mask not in (None, self.mask_token_id):
            raise ValueError(
                f"mask_token_id: found {mask}, expected {self.mask_token_id}, the last token"
            )
        if hidden_dim % (2 * n_heads):
            raise ValueError(
                f"hidden_dim: found {hidden_dim}, expected a multiple of {2 * n_heads}, "
                "twice the number of heads"
            )
        if schedule not in SHARES:
            raise ValueError(f"schedule: found {schedule!r}, expected one of {', '.join(SHARES)}")
        if architecture not in ("dit", "gpt2") or (architecture == "gpt2" and time_conditioning):
            raise ValueError(
                f"architecture: found {architecture!r} with time_conditioning {time_conditioning}, "
                "expected dit, or gpt2 without it"
            )


class ZeroLinear(nn.Linear):
    """A linear layer that is zero before training."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Norm(nn.Module):
    """LayerNorm with a weight (gpt2: and a bias), then adaLN's scale and shift; float32 inside."""

    def __init__(self, width, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x, shift=0, scale=0):
        bias = None if self.bias is None else self.bias.float()
        h = F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), bias, eps=1e-5)
        return (h * (1 + scale) + shift).to(x.dtype)


class Embedding(nn.Module):
    """nn.Embedding; its weight is named `embedding` in the files."""

    def __init__(self, vocabulary, width):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocabulary, width))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.embedding, a=5**0.5)

    @property
    def weight(self):
        return self.embedding

    def forward(self, x):
        return F.embedding(x, self.embedding)


class TimeEmbedding(nn.Module):
    def __init__(self, cond_dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma):
        powers = torch.arange(128, device=sigma.device, dtype=torch.float32) / 128
        angles = sigma.float()[:, None] * 1e4**-powers
        features = torch.cat([angles.cos(), angles.sin()], -1)
        return F.silu(self.mlp(features.to(self.mlp[0].weight.dtype)))


class Rotary(nn.Module):
    """cos and sin [L, head_width] of the rotary position embedding, always in float32."""

    def __init__(self, head_width):
        super().__init__()
        self.head_width = head_width
        self.register_buffer("inv_freq", torch.empty(head_width // 2, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self):
        if not getattr(self.inv_freq, "_is_hf_initialized", False):  # not read from a file
            powers = torch.arange(0, self.head_width, 2, device=self.inv_freq.device).float()
            self.inv_freq.copy_(1e4 ** -(powers / self.head_width))

    def _apply(self, fn, recurse=True):
        """model.to(...): change the device, but not the dtype, which would round the angles."""
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if not exact.is_meta:
            self.inv_freq = exact.to(self.inv_freq.device)
        return self

    def forward(self, length):
        positions = torch.arange(length, device=self.inv_freq.device).float()
        angles = torch.outer(positions, self.inv_freq)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return (x * cos + turned * sin).to(x.dtype)


def eager_attention(q, k, v, keys):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if keys is not None:
        scores = scores.masked_fill(~keys, -torch.inf)
    return scores.float().softmax(-1).to(v.dtype) @ v


ATTENTION = {  # attn_implementation -> function of q, k, v [B, heads, L, D], keys [B, 1, 1, L]
    "sdpa": F.scaled_dot_product_attention,
    "eager": eager_attention,
}


class Block(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width, is_gpt2 = config.hidden_dim, config.architecture == "gpt2"
        self.norm1, self.norm2 = Norm(width, is_gpt2), Norm(width, is_gpt2)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=is_gpt2)
        self.attn_out = nn.Linear(width, width, bias=is_gpt2)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.adaLN_modulation = None if is_gpt2 else ZeroLinear(config.cond_dim, 6 * width)

    def forward(self, x, cos, sin, cond, keys):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = 0, 0, 1, 0, 0, 1
        if self.adaLN_modulation is not None:
            modulation = self.adaLN_modulation(cond)[:, None]
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, -1)
        B, L, D = x.shape
        heads = self.config.n_heads
        qkv = self.attn_qkv(self.norm1(x, shift_a, scale_a))
        q, k, v = qkv.view(B, L, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        attend = ATTENTION[self.config._attn_implementation]
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        h = attend(q, k, v, keys)
        x = x + gate_a * self.attn_out(h.transpose(1, 2).reshape(B, L, D))
        return x + gate_m * self.mlp(self.norm2(x, shift_m, scale_m))


class Head(nn.Module):
    """Final norm, and the readout `linear`, which HalfstepForMaskedLM applies."""

    def __init__(self, config):
        super().__init__()
        self.norm_final = Norm(config.hidden_dim)
        self.linear = ZeroLinear(config.hidden_dim, config.vocab_size)
        self.adaLN_modulation = ZeroLinear(config.cond_dim, 2 * config.hidden_dim)

    def forward(self, x, cond):
        shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, -1)
        return self.norm_final(x, shift, scale)


WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def known(x: Tensor) -> bool:
    """Whether the values of a tensor can be looked at; a traced tensor has none yet."""
    return not (x.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing())


def describe(x) -> str:
    """Type and shape of an argument, for messages."""
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def is_whole(x) -> bool:
    return isinstance(x, Tensor) and x.dtype in WHOLE


def checked_ids(input_ids: Tensor, vocab_size: int) -> Tensor:
    """input_ids as int64 [B, L], or a ValueError."""
    if not is_whole(input_ids) or input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids: found {describe(input_ids)}, expected whole numbers [B, L]; "
            "one text is a batch of one: input_ids[None]"
        )
    ids = input_ids.long()
    if known(ids):
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if len(wrong):
            raise ValueError(
                f"input_ids: found token {wrong[0].item()}, expected 0 to {vocab_size - 1}; "
                "use the tokenizer of this model"
            )
    return ids


def checked_keys(attention_mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """The positions that attention reads, bool [B, 1, 1, L]; None is all. Or a ValueError."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask: found {describe(attention_mask)}, expected {list(ids.shape)}, "
            "the shape of input_ids: 1 for a token and 0 for padding"
        )
    keys = attention_mask.to(device=ids.device) != 0
    if known(keys):
        if attention_mask.dtype != torch.bool and (attention_mask[attention_mask != 0] != 1).any():
            raise ValueError(
                "attention_mask: found values other than 0 and 1, "
                "expected 1 for a token and 0 for padding"
            )
        if keys.all():
            return None
    keys = keys | ~keys.any(-1, keepdim=True)  # a row of padding only must not become NaN
    return keys[:, None, None]


def shifted_features(h: Tensor, keys: Tensor | None) -> Tensor:
    """For each token of h[B, L, D] the features of the token before it; the last for the first.

    Tokens are the positions that attention reads, keys[B, 1, 1, L] or all; others are padding.
    """
    if keys is None:
        return h.roll(1, 1)
    real = keys[:, 0, 0]
    places = torch.arange(h.shape[1], device=h.device)
    last = torch.where(real, places, -1).cummax(1).values  # the last token up to each position
    before = last.roll(1, 1)
    before = torch.where(before < 0, last[:, -1:], before)
    return h.gather(1, before[..., None].expand_as(h))


class HalfstepPreTrainedModel(PreTrainedModel):
    config_class = HalfstepConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (transformers' idiom)

    def _init_weights(self, module):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        # transformers calls this when a model is built and when its attention is changed.
        if attn_implementation not in (None, *ATTENTION):
            raise ValueError(
                f"attn_implementation: found {attn_implementation!r}, "
                f"expected one of {', '.join(ATTENTION)}"
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def get_input_embeddings(self):
        return self.base_model.vocab_embed

    def set_input_embeddings(self, value):
        self._check_rows(value)
        self.base_model.vocab_embed.embedding = value.weight

    def get_output_embeddings(self):
        return None

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"new_num_tokens: found {new_num_tokens}, expected {self.config.vocab_size}; "
                "the vocabulary cannot change, because its last token is the mask"
            )
        return self.get_input_embeddings()

    def _check_rows(self, value):
        expected = [self.config.vocab_size, self.config.hidden_dim]
        if list(value.weight.shape) != expected:
            raise ValueError(
                f"embeddings: found shape {list(value.weight.shape)}, expected {expected}"
            )


class HalfstepModel(HalfstepPreTrainedModel):
    """The network without its readout: token ids -> features."""

    def __init__(self, config: HalfstepConfig):
        super().__init__(config)
        self.vocab_embed = Embedding(config.vocab_size, config.hidden_dim)
        if config.architecture == "gpt2":
            self.position_embed = Embedding(config.model_length, config.hidden_dim)
        else:
            self.sigma_map = TimeEmbedding(config.cond_dim)
            self.rotary_emb = Rotary(config.hidden_dim // config.n_heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        if config.architecture == "gpt2":
            self.norm_final = Norm(config.hidden_dim, bias=True)
        else:
            self.output_layer = Head(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        t: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple:
        """Features after the final norm, [B, L, D]; those at position i predict the token at i.

        Args:
            input_ids: [B, L], with mask_token_id where a token is wanted
            attention_mask: [B, L], 1 for a token and 0 for padding, on any side (default: all 1)
            t: [B] in [0, 1], the diffusion time, for networks with time_conditioning (default: the
                time at which the share of masked tokens is that of the row)
            output_hidden_states: also the input of each block, then the features
            return_dict: False for a tuple
        """
        ids = checked_ids(input_ids, self.config.vocab_size)
        keys = checked_keys(attention_mask, ids)
        h = self.vocab_embed(ids)
        cond = cos = sin = None
        if self.config.architecture == "gpt2":
            h = h + self.position_embed(self._positions(ids, keys))
        else:
            cond = self.sigma_map(self._sigma(t, ids, keys))
            cos, sin = self.rotary_emb(ids.shape[1])
        states = []
        for block in self.blocks:
            states.append(h)
            h = block(h, cos, sin, cond, keys)
        h = self.norm_final(h) if cond is None else self.output_layer(h, cond)
        if self.config.shifted:
            h = shifted_features(h, keys)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = BaseModelOutput(
            last_hidden_state=h, hidden_states=(*states, h) if output_hidden_states else None
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _positions(self, ids: Tensor, keys: Tensor | None) -> Tensor:
        """Position of each token [B or 1, L], counted from the first one that is no padding."""
        if ids.shape[1] > self.config.model_length:
            raise ValueError(
                f"input_ids: found {ids.shape[1]} tokens, expected at most "
                f"{self.config.model_length}, the positions of this model"
            )
        if keys is None:
            return torch.arange(ids.shape[1], device=ids.device)[None]
        return (keys[:, 0, 0].long().cumsum(-1) - 1).clamp(min=0)

    def read_out(self, h: Tensor) -> Tensor:
        """Logits [B, L, V + 1] of features h[B, L, D], that of the mask token among them."""
        if self.config.architecture == "gpt2":
            return F.linear(h, self.vocab_embed.weight)
        return self.output_layer.linear(h)

    def _sigma(self, t: Tensor | None, ids: Tensor, keys: Tensor | None) -> Tensor:
        """Noise level -log alpha(t), [B]; 0 for a network that ignores the time."""
        if not self.config.time_conditioning:
            return torch.zeros(1, device=ids.device)
        schedule = self.config.schedule
        if t is None:
            real = torch.ones_like(ids, dtype=torch.bool) if keys is None else keys[:, 0, 0]
            masked = (ids == self.config.mask_token_id) & real
            share = masked.sum(-1) / real.sum(-1) / (1 - EPS)
            t = TIMES[schedule](share.clamp(max=1))
        elif not torch.is_tensor(t) or t.shape != ids.shape[:1] or not t.is_floating_point():
            raise ValueError(
                f"t: found {describe(t)}, expected a time in [0, 1] for each text, [{len(ids)}]"
            )
        elif known(t) and not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"t: found {t.tolist()}, expected times in [0, 1]")
        return -torch.log1p(-(1 - EPS) * SHARES[schedule](t.float()))


class HalfstepForMaskedLM(HalfstepPreTrainedModel):
    """The denoiser: its logits are log p(x0 | xt), the SUBS parameterization of MDLM.

    The mask token has no probability, and a visible token keeps its value with probability 1.
    """

    def __init__(self, config: HalfstepConfig):
        super().__init__(config)
        self.backbone = HalfstepModel(config)
        self.post_init()

    def get_output_embeddings(self):
        if self.config.architecture == "gpt2":
            return self.backbone.vocab_embed
        return self.backbone.output_layer.linear

    def set_output_embeddings(self, value):
        self._check_rows(value)
        if self.config.architecture == "gpt2":
            self.set_input_embeddings(value)
        else:
            self.backbone.output_layer.linear = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        t: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple:
        """log p of the clean tokens, float32 [B, L, V], and the mean loss of the labels.

        Args:
            input_ids: [B, L], with mask_token_id where a token is wanted
            attention_mask: [B, L], 1 for a token and 0 for padding, on any side (default: all 1)
            labels: [B, L], the clean tokens; -100 is ignored
            t: [B] in [0, 1], the diffusion time, for networks with time_conditioning (default: the
                time at which the share of masked tokens is that of the row)
            output_hidden_states: also the input of each block, then the features
            return_dict: False for a tuple
        """
        features = self.backbone(input_ids, attention_mask, t, output_hidden_states, True)
        log_p = self._log_p(features.last_hidden_state, input_ids.long())
        loss = None if labels is None else self._loss(log_p, labels)
        output = MaskedLMOutput(loss=loss, logits=log_p, hidden_states=features.hidden_states)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _log_p(self, h: Tensor, ids: Tensor) -> Tensor:
        mask = self.config.mask_token_id
        logits = self.backbone.read_out(h).float()
        logits[..., mask] = -torch.inf
        log_p = logits.log_softmax(-1)
        ids = ids.to(log_p.device)[..., None]
        visible = torch.full_like(log_p, -torch.inf).scatter_(-1, ids, 0.0)
        return torch.where(ids == mask, log_p, visible)

    def _loss(self, log_p: Tensor, labels: Tensor) -> Tensor:
        """Mean of -log p over the labels that are not -100."""
        shape = log_p.shape[:2]
        if not is_whole(labels) or labels.shape != shape:
            raise ValueError(
                f"labels: found {describe(labels)}, expected whole numbers {list(shape)}"
            )
        labels = labels.to(log_p.device).long()
        outside = (labels != -100) & ((labels < 0) | (labels >= self.config.vocab_size))
        if known(labels) and outside.any():
            raise ValueError(
                f"labels: found token {labels[outside][0].item()}, expected -100, "
                f"or 0 to {self.config.vocab_size - 1}"
            )
        loss = F.nll_loss(log_p.flatten(0, 1), labels.flatten(), ignore_index=-100)
        if known(loss) and loss.isposinf():
            raise ValueError(
                "labels: found a token of probability 0: a label that is the mask token, or one "
                "that differs from a visible token; give -100 there, or mask the token (with "
                "DataCollatorForLanguageModeling: mask_replace_prob=1, random_replace_prob=0)"
            )
        return loss

    @torch.no_grad()
    def sample(
        self,
        num_samples: int | None = None,
        steps: int | None = None,
        length: int | None = None,
        input_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Ancestral sampling in `steps` steps; returns token ids, [num_samples, length].

        Args:
            num_samples: number of texts (default: 1, or the rows of input_ids)
            steps: number of steps (default: config.steps)
            length: tokens per text (default: config.model_length, or the columns of input_ids)
            input_ids: [num_samples, length]; all tokens that are not masked stay as they are
            generator: source of the random numbers
            attention_mask: [num_samples, length], 0 for padding of input_ids
        """
        mask, device = self.config.mask_token_id, self.device
        steps = self.config.steps if steps is None else steps
        x = self._start(num_samples, length, input_ids)
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: found {steps!r}, expected a whole number from 1")

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device, dtype=torch.float64)

        share = SHARES[self.config.schedule](
            torch.tensor([1 - i / steps for i in range(steps + 1)], dtype=torch.float64)
        ).tolist()
        for i in range(steps):
            t = torch.full((len(x),), 1 - i / steps, device=device)
            u = uniform(*x.shape)  # drawn in the last step too, which reveals everything
            reveal = x == mask
            if i < steps - 1:
                reveal &= u < (share[i] - share[i + 1]) / share[i]
            if reveal.any():
                log_p = self(x, attention_mask=attention_mask, t=t, return_dict=True).logits
                cdf = log_p[reveal].double().exp().cumsum(-1)
                threshold = uniform(len(cdf), 1) * cdf[:, -1:]
                x[reveal] = (cdf <= threshold).sum(-1).clamp(max=mask - 1)
        return x

    def _start(
        self, num_samples: int | None, length: int | None, input_ids: Tensor | None
    ) -> Tensor:
        """The texts before the first step: masks only, or a copy of input_ids."""
        if input_ids is None:
            rows = 1 if num_samples is None else num_samples
            columns = self.config.model_length if length is None else length
            if not all(isinstance(n, int) and n > 0 for n in (rows, columns)):
                raise ValueError(
                    f"num_samples, length: found {rows!r}, {columns!r}, "
                    "expected whole numbers from 1"
                )
            return torch.full((rows, columns), self.config.mask_token_id, device=self.device)
        x = checked_ids(input_ids, self.config.vocab_size).to(self.device, copy=True)
        if num_samples not in (None, len(x)) or length not in (None, x.shape[1]):
            raise ValueError(
                f"input_ids: found shape {list(x.shape)}, expected [num_samples, length], "
                f"[{num_samples}, {length}]; leave num_samples and length out"
            )
        return x
