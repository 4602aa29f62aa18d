"""Names and shapes of real models, from their published configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a model.

    Attributes:
        name: As its checkpoints on the Hugging Face hub name it.
        shape: Its shape.
        tp_dim: The dimension that tensor parallelism cuts; None where every rank holds it whole.
        layer: The transformer layer that it is in; −1 before the first, `layers` after the last.
        expert: The routed expert that it is of, or None.
    """

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None
    layer: int
    expert: int | None = None

    @property
    def size(self) -> int:
        """Elements."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True, slots=True)
class Model:
    """A model.

    Attributes:
        name: Its name.
        layers: Number of transformer layers.
        experts: Routed experts a layer, or 0.
        parameters: All of its parameters.
    """

    name: str
    layers: int
    experts: int = 0
    parameters: list[Parameter] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Parameters, counted one by one."""
        return sum(parameter.size for parameter in self.parameters)


def llama3(name: str, *, hidden: int, ffn: int, layers: int, heads: int) -> Model:
    """Llama 3 (arXiv 2407.21783, table 3): 8 key-value heads of 128, a vocabulary of 128,256."""
    vocabulary, kv_heads, head = 128_256, 8, 128

    def parameters() -> Iterator[Parameter]:
        yield Parameter("model.embed_tokens.weight", (vocabulary, hidden), 0, -1)
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            for key, shape, dim in (
                ("self_attn.q_proj", (heads * head, hidden), 0),
                ("self_attn.k_proj", (kv_heads * head, hidden), 0),
                ("self_attn.v_proj", (kv_heads * head, hidden), 0),
                ("self_attn.o_proj", (hidden, heads * head), 1),
                ("mlp.gate_proj", (ffn, hidden), 0),
                ("mlp.up_proj", (ffn, hidden), 0),
                ("mlp.down_proj", (hidden, ffn), 1),
                ("input_layernorm", (hidden,), None),
                ("post_attention_layernorm", (hidden,), None),
            ):
                yield Parameter(f"{prefix}{key}.weight", shape, dim, layer)
        yield Parameter("model.norm.weight", (hidden,), None, layers)
        yield Parameter("lm_head.weight", (vocabulary, hidden), 0, layers)

    return Model(name, layers, 0, list(parameters()))


def gpt2_small() -> Model:
    """GPT-2 small: 12 layers of 768, tied embeddings; its linear layers are stored transposed."""
    hidden, layers = 768, 12

    def parameters() -> Iterator[Parameter]:
        yield Parameter("transformer.wte.weight", (50_257, hidden), 0, -1)
        yield Parameter("transformer.wpe.weight", (1024, hidden), None, -1)
        for layer in range(layers):
            prefix = f"transformer.h.{layer}."
            for key, shape, dim in (
                ("ln_1.weight", (hidden,), None),
                ("ln_1.bias", (hidden,), None),
                ("attn.c_attn.weight", (hidden, 3 * hidden), 1),
                ("attn.c_attn.bias", (3 * hidden,), 0),
                ("attn.c_proj.weight", (hidden, hidden), 0),
                ("attn.c_proj.bias", (hidden,), None),
                ("ln_2.weight", (hidden,), None),
                ("ln_2.bias", (hidden,), None),
                ("mlp.c_fc.weight", (hidden, 4 * hidden), 1),
                ("mlp.c_fc.bias", (4 * hidden,), 0),
                ("mlp.c_proj.weight", (4 * hidden, hidden), 0),
                ("mlp.c_proj.bias", (hidden,), None),
            ):
                yield Parameter(prefix + key, shape, dim, layer)
        yield Parameter("transformer.ln_f.weight", (hidden,), None, layers)
        yield Parameter("transformer.ln_f.bias", (hidden,), None, layers)

    return Model("GPT-2 small", layers, 0, list(parameters()))


def deepseek_v3() -> Model:
    """DeepSeek-V3 (arXiv 2412.19437), without its multi-token prediction: 256 experts a layer."""
    hidden, layers, dense, vocabulary = 7168, 61, 3, 129_280
    heads, q_lora, kv_lora, nope, rope, value = 128, 1536, 512, 128, 64, 128
    dense_ffn, expert_ffn, experts = 18_432, 2048, 256

    def feed_forward(prefix: str, ffn: int, layer: int, expert: int | None) -> Iterator[Parameter]:
        # Experts are cut by expert parallelism instead.
        cut = expert is None
        yield Parameter(
            f"{prefix}gate_proj.weight", (ffn, hidden), 0 if cut else None, layer, expert
        )
        yield Parameter(f"{prefix}up_proj.weight", (ffn, hidden), 0 if cut else None, layer, expert)
        yield Parameter(
            f"{prefix}down_proj.weight", (hidden, ffn), 1 if cut else None, layer, expert
        )

    def parameters() -> Iterator[Parameter]:
        yield Parameter("model.embed_tokens.weight", (vocabulary, hidden), 0, -1)
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            for key, shape, dim in (
                ("self_attn.q_a_proj", (q_lora, hidden), None),
                ("self_attn.q_a_layernorm", (q_lora,), None),
                ("self_attn.q_b_proj", (heads * (nope + rope), q_lora), 0),
                ("self_attn.kv_a_proj_with_mqa", (kv_lora + rope, hidden), None),
                ("self_attn.kv_a_layernorm", (kv_lora,), None),
                ("self_attn.kv_b_proj", (heads * (nope + value), kv_lora), 0),
                ("self_attn.o_proj", (hidden, heads * value), 1),
                ("input_layernorm", (hidden,), None),
                ("post_attention_layernorm", (hidden,), None),
            ):
                yield Parameter(f"{prefix}{key}.weight", shape, dim, layer)
            if layer < dense:
                yield from feed_forward(f"{prefix}mlp.", dense_ffn, layer, None)
                continue
            yield Parameter(f"{prefix}mlp.gate.weight", (experts, hidden), None, layer)
            yield Parameter(f"{prefix}mlp.gate.e_score_correction_bias", (experts,), None, layer)
            yield from feed_forward(f"{prefix}mlp.shared_experts.", expert_ffn, layer, None)
            for expert in range(experts):
                yield from feed_forward(f"{prefix}mlp.experts.{expert}.", expert_ffn, layer, expert)
        yield Parameter("model.norm.weight", (hidden,), None, layers)
        yield Parameter("lm_head.weight", (vocabulary, hidden), 0, layers)

    return Model("DeepSeek-V3 671B", layers, experts, list(parameters()))


MODELS: dict[str, Callable[[], Model]] = {
    "gpt2-small": gpt2_small,
    "llama3-8b": lambda: llama3("Llama 3 8B", hidden=4096, ffn=14_336, layers=32, heads=32),
    "llama3-70b": lambda: llama3("Llama 3 70B", hidden=8192, ffn=28_672, layers=80, heads=64),
    "llama3-405b": lambda: llama3("Llama 3 405B", hidden=16_384, ffn=53_248, layers=126, heads=128),
    "deepseek-v3": deepseek_v3,
}
