"""Attention as one operator, so that no tokens x tokens matrix is written out.

The op `edgesd::multi_head_attention` computes in torch with scaled_dot_product_attention; the
exporter translates it to `com.microsoft::MultiHeadAttention` (ONNX Runtime's contrib operators).
With lowering "sdpa" the same modules call scaled_dot_product_attention, which exports as
standard operators.
"""

from __future__ import annotations

from typing import Any, Literal

import onnx
import onnxscript
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import NewGELUActivation
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.t5.modeling_t5 import T5Attention

from edgesd.errors import InputError

Lowering = Literal["ort-mha", "sdpa"]


@torch.library.custom_op("edgesd::multi_head_attention", mutates_args=())
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float,
    causal: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale query key^T + bias) value per head (Vaswani et al. 2017, arXiv 1706.03762,
    eq. 1).

    query [batch, n, heads * d], key [batch, m, heads * d], value [batch, m, heads * e]
    -> [batch, n, heads * e]. causal: token i sees tokens up to i only. bias: [1, heads, n, m].
    """
    return _attend(query, key, value, heads, scale, causal, bias).contiguous()


@multi_head_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float,
    causal: bool,
    bias: Tensor | None = None,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


class Processor:
    """Computes what diffusers' AttnProcessor2_0 does, through `attend`."""

    def __init__(self, lowering: Lowering) -> None:
        self.attend = _ATTEND[lowering]

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [batch, n, C] or [batch, C, h, w] -> the same shape."""
        if attention_mask is not None:
            raise InputError("attention masks aren't supported in the UNet and the VAE")
        residual, shape = hidden_states, hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        out: Tensor = self.attend(query, key, value, attn.heads, attn.scale, False)
        out = attn.to_out[1](attn.to_out[0](out))
        if len(shape) == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


class CausalAttention(nn.Module):
    """Stands in for transformers' CLIPAttention; the causal mask is the operator's own."""

    def __init__(self, clip: CLIPAttention, lowering: Lowering) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = clip.q_proj, clip.k_proj, clip.v_proj
        self.out_proj = clip.out_proj
        self.heads, self.scale = clip.num_heads, clip.scale
        self.attend = _ATTEND[lowering]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """hidden_states [batch, tokens, C] -> the same shape, and no attention weights."""
        query, key, value = (
            project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self.attend(query, key, value, self.heads, self.scale, True)), None


class RelativeAttention(nn.Module):
    """Stands in for transformers' T5Attention of an encoder, whose scores have a bias by how far
    off a key is. That of the first layer makes it, for all layers.

    biases: [heads, rows], and buckets: int64 [n, n], the row for each query and key; of the first
    layer alone (families/parts/t5.py).
    """

    biases: Tensor
    buckets: Tensor

    def __init__(self, t5: T5Attention, lowering: Lowering) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = t5.q, t5.k, t5.v, t5.o
        self.heads, self.scale = t5.n_heads, t5.scaling
        self.attend = _ATTEND[lowering]
        for name, buffer in t5.named_buffers():
            self.register_buffer(name, buffer, persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """hidden_states [batch, n, C] -> the same shape, the bias [1, heads, n, n], and no
        attention weights. mask: hides nothing; transformers makes one while it is exported."""
        if position_bias is None:
            heads, tokens = len(self.biases), len(self.buckets)
            position_bias = self.biases.index_select(1, self.buckets.flatten())
            position_bias = position_bias.reshape(1, heads, tokens, tokens)
        query, key, value = (project(hidden_states) for project in (self.q, self.k, self.v))
        out = self.attend(query, key, value, self.heads, self.scale, False, position_bias)
        return self.o(out), position_bias, None


def replace_attention(module: nn.Module, lowering: Lowering) -> int:
    """Replace every attention inside `module`, in place; returns how many there are. transformers'
    GELU of eight operators becomes torch's.

    Raises InputError for a kind of attention that this can't express.
    """
    count = 0
    for name, child in list(module.named_modules()):
        if isinstance(child, Attention):
            for part in ("norm_q", "norm_k", "spatial_norm", "add_k_proj"):
                if getattr(child, part, None) is not None:
                    raise InputError(f"{name}: attention with {part} isn't supported")
            set_processor: Any = child.set_processor
            set_processor(Processor(lowering))
        elif isinstance(child, CLIPAttention):
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, CausalAttention(child, lowering))
        elif isinstance(child, T5Attention):
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, RelativeAttention(child, lowering))
        elif isinstance(child, NewGELUActivation):
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, nn.GELU(approximate="tanh"))
            continue
        else:
            continue
        count += 1
    return count


def translation_table() -> dict[Any, Any]:
    """How torch.onnx.export writes the op: its `custom_translation_table`."""
    return {torch.ops.edgesd.multi_head_attention.default: _to_onnx}


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float,
    causal: bool,
    bias: Tensor | None = None,
) -> Tensor:
    query, key, value = (
        t.reshape(t.shape[0], t.shape[1], heads, t.shape[2] // heads).transpose(1, 2)
        for t in (query, key, value)
    )
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2).flatten(2)


_ATTEND: dict[Lowering, Any] = {"ort-mha": multi_head_attention, "sdpa": _attend}


def _mha_op() -> onnxscript.values.Op:
    """The parts of the contrib operator that are used here; onnx has no schema for it."""
    schema = onnx.defs.OpSchema
    kinds = schema.AttrType
    optional = schema.FormalParameterOption.Optional
    return onnxscript.values.Op(
        onnxscript.values.Opset("com.microsoft", 1),
        "MultiHeadAttention",
        schema(
            "MultiHeadAttention",
            "com.microsoft",
            1,
            inputs=[
                *(schema.FormalParameter(name, "T") for name in ("query", "key", "value")),
                *(
                    schema.FormalParameter(name, "T", param_option=optional)
                    for name in ("bias", "key_padding_mask", "attention_bias")
                ),
            ],
            outputs=[schema.FormalParameter("output", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
            attributes=[
                schema.Attribute("num_heads", kinds.INT),
                schema.Attribute("scale", kinds.FLOAT),
                schema.Attribute("unidirectional", kinds.INT),
            ],
        ),
    )


_MHA = _mha_op()


def _to_onnx(
    query: Any,
    key: Any,
    value: Any,
    heads: int,
    scale: float,
    causal: bool,
    bias: Any = None,
) -> Any:
    more = () if bias is None else (None, None, bias)
    return _MHA(query, key, value, *more, num_heads=heads, scale=scale, unidirectional=int(causal))
