"""Attention as one operator, so that no tokens x tokens matrix is written out; likewise what
transformers compute around it: RMS norms and rotary embeddings.

The op `edgesd::multi_head_attention` computes in torch with scaled_dot_product_attention; the
exporter translates it to `com.microsoft::MultiHeadAttention` (ONNX Runtime's contrib operators).
With lowering "sdpa" the same modules call scaled_dot_product_attention, which exports as
standard operators. `edgesd::rms_norm` becomes `SimplifiedLayerNormalization`, and `edgesd::rotary`
`com.microsoft::RotaryEmbedding`, which passes/standard_norms.py writes out for other compilers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import onnx
import onnxscript
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from onnxscript import opset20
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import NewGELUActivation
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

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


@torch.library.custom_op("edgesd::rms_norm", mutates_args=())
def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden / sqrt(mean(hidden^2) + eps) * weight over the last axis (Zhang and Sennrich 2019,
    arXiv 1910.07467, eq. 4): hidden [..., D], weight [D] -> [..., D]."""
    return F.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


@rms_norm.register_fake
def _(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("edgesd::rotary", mutates_args=())
def rotary(hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs of each head's values (Su et al. 2021, arXiv 2104.09864, eq. 34).

    hidden [batch, n, heads * d]; cos, sin [n, d / 2] -> [batch, n, heads * d].
    """
    even, odd = hidden.reshape(*hidden.shape[:2], -1, cos.shape[-1], 2).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(2)


@rotary.register_fake
def _(hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(hidden)


class RmsNorm(nn.RMSNorm):
    """torch's, as one operator: a norm becomes one by its class, so that its weight stays where
    it is (mapped.py)."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape."""
        found: Tensor = rms_norm(x, self.weight, self.eps)
        return found


class T5RmsNorm(T5LayerNorm):
    """The same of transformers' T5."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> the same shape."""
        found: Tensor = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return found


class JointProcessor:
    """Computes what diffusers' FluxAttnProcessor does: attention of image and text tokens together,
    the text's first, or of tokens that are joined already."""

    def __init__(self, lowering: Lowering) -> None:
        self.attend = _ATTEND[lowering]

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states [batch, n, C] and encoder_hidden_states [batch, m, C] -> both;
        image_rotary_emb: cos and sin [m + n, d / 2] (see `rotary`)."""
        if attention_mask is not None or image_rotary_emb is None:
            raise InputError("joint attention takes rotary embeddings, and no mask")
        query, key, value = _heads(attn, hidden_states, "to_{}", "norm_{}")
        if encoder_hidden_states is not None:
            text = _heads(attn, encoder_hidden_states, "add_{}_proj", "norm_added_{}")
            pairs = zip(text, (query, key, value), strict=True)
            query, key, value = (torch.cat(pair, 1) for pair in pairs)
        query, key = (rotary(each, *image_rotary_emb) for each in (query, key))
        out: Tensor = self.attend(query, key, value, attn.heads, attn.head_dim**-0.5, False)
        if encoder_hidden_states is None:
            return out
        tokens = encoder_hidden_states.shape[1]
        image: Tensor = attn.to_out[1](attn.to_out[0](out[:, tokens:]))
        return image, attn.to_add_out(out[:, :tokens])


def _heads(
    attn: FluxAttention, hidden: Tensor, project: str, norm: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [batch, n, heads * d] of hidden [batch, n, C], both first ones normed
    head by head. project, norm: names of the parts that make q, k and v."""
    query, key = (
        getattr(attn, norm.format(each))(
            getattr(attn, project.format(each))(hidden).unflatten(-1, (attn.heads, -1))
        ).flatten(2)
        for each in "qk"
    )
    return query, key, getattr(attn, project.format("v"))(hidden)


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
    GELU of eight operators becomes torch's, and RMS norms one operator.

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
        elif isinstance(child, FluxAttention):
            child.set_processor(JointProcessor(lowering))
            for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                if (norm := getattr(child, part, None)) is not None:
                    norm.__class__ = RmsNorm
        elif isinstance(child, CLIPAttention):
            module.set_submodule(name, CausalAttention(child, lowering))
        elif isinstance(child, T5Attention):
            module.set_submodule(name, RelativeAttention(child, lowering))
        elif isinstance(child, T5LayerNorm):
            child.__class__ = T5RmsNorm
            continue
        elif isinstance(child, NewGELUActivation):
            module.set_submodule(name, nn.GELU(approximate="tanh"))
            continue
        else:
            continue
        count += 1
    return count


def translation_table() -> dict[Any, Any]:
    """How torch.onnx.export writes the ops: its `custom_translation_table`."""
    return {
        torch.ops.edgesd.multi_head_attention.default: _to_onnx,
        torch.ops.edgesd.rms_norm.default: _rms_norm_to_onnx,
        torch.ops.edgesd.rotary.default: _rotary_to_onnx,
    }


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


_INT, _FLOAT = onnx.defs.OpSchema.AttrType.INT, onnx.defs.OpSchema.AttrType.FLOAT


def _contrib_op(
    name: str, inputs: Mapping[str, str], attributes: Mapping[str, Any], domain: str, version: int
) -> onnxscript.values.Op:
    """The parts of a contrib operator of ONNX Runtime that are used here; onnx has no schema for
    it. inputs: name -> type, T of floating point or I of int64; ? where it may be left out."""
    schema = onnx.defs.OpSchema
    return onnxscript.values.Op(
        onnxscript.values.Opset(domain, version),
        name,
        schema(
            name,
            domain,
            version,
            inputs=[_parameter(each, kind) for each, kind in inputs.items()],
            outputs=[schema.FormalParameter("output", "T")],
            type_constraints=[
                ("T", ["tensor(float)", "tensor(float16)"], ""),
                ("I", ["tensor(int64)"], ""),
            ],
            attributes=[schema.Attribute(each, kind) for each, kind in attributes.items()],
        ),
    )


def _parameter(name: str, kind: str) -> Any:
    schema = onnx.defs.OpSchema
    if not kind.endswith("?"):
        return schema.FormalParameter(name, kind)
    optional = schema.FormalParameterOption.Optional
    return schema.FormalParameter(name, kind[:-1], param_option=optional)


_MHA = _contrib_op(
    "MultiHeadAttention",
    {
        "query": "T",
        "key": "T",
        "value": "T",
        "bias": "T?",
        "key_padding_mask": "T?",
        "attention_bias": "T?",
    },
    {"num_heads": _INT, "scale": _FLOAT, "unidirectional": _INT},
    "com.microsoft",
    1,
)
_ROTARY = _contrib_op(
    "RotaryEmbedding",
    {"input": "T", "position_ids": "I", "cos_cache": "T", "sin_cache": "T"},
    {"interleaved": _INT},
    "com.microsoft",
    1,
)
_RMS_NORM = _contrib_op(
    "SimplifiedLayerNormalization",
    {"X": "T", "Scale": "T"},
    {"axis": _INT, "epsilon": _FLOAT},
    "",
    1,
)


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


def _rms_norm_to_onnx(hidden: Any, weight: Any, eps: float) -> Any:
    return _RMS_NORM(hidden, weight, axis=-1, epsilon=eps)


def _rotary_to_onnx(hidden: Any, cos: Any, sin: Any) -> Any:
    first = opset20.Constant(value_ints=[0])
    return _ROTARY(hidden, first, cos, sin, interleaved=1)
