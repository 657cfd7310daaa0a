"""The four models of the ViViT paper (arXiv 2103.15691) in NumPy: the oracle for models, slow and obvious.

    logits = numpy_vivit.logits(config, tensors, clip)

Everything is computed in float64, for one clip, from tensors with published names. Sections are those of the paper.
T', H', W' tubelets along time, height and width; D hidden size.
"""

from collections.abc import Mapping

import numpy as np

from handler.models.config import VivitConfig

Array = np.ndarray


def logits(config: VivitConfig, tensors: Mapping[str, Array], clip: Array) -> Array:
    """Classifies a clip.

    Args:
        config: configuration of the model.
        tensors: weights by their published names.
        clip: (T, C, H, W), normalized.

    Returns:
        float64 (num_labels,).
    """
    model = _Model(config, {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()})
    tokens = model.embed_tubelets(np.asarray(clip, np.float64))  # (T', H', W', D)
    if config.attention_type == "factorised_encoder":
        representation = model.factorised_encoder(tokens)
    else:
        representation = model.single_encoder(tokens)
    return model.linear("classifier", representation)


class _Model:
    def __init__(self, config: VivitConfig, tensors: Mapping[str, Array]):
        self.config = config
        self.tensors = tensors

    def embed_tubelets(self, clip: Array) -> Array:
        """Section 3.2: a linear projection of each tubelet, or of each patch of some frames, to (T', H', W', D)."""
        t, h, w = self.config.tubelet_size
        if self.config.tubelet_embedding == "uniform_frames":
            clip, t = clip[sampled_frames(len(clip), len(clip) // t)], 1
        kernel = self.tensors["vivit.embeddings.patch_embeddings.projection.weight"]  # (D, C, t, h, w)
        bias = self.tensors["vivit.embeddings.patch_embeddings.projection.bias"]
        grid = len(clip) // t, clip.shape[2] // h, clip.shape[3] // w
        tokens = np.empty((*grid, len(bias)))
        for z, y, x in np.ndindex(grid):
            tubelet = clip[z * t : (z + 1) * t, :, y * h : (y + 1) * h, x * w : (x + 1) * w]  # (t, C, h, w)
            tokens[z, y, x] = [np.sum(tubelet.transpose(1, 0, 2, 3) * filter) for filter in kernel]
        return tokens + bias

    def single_encoder(self, tokens: Array) -> Array:
        """Sections 3.3.1, 3.3.3 and 3.3.4: one encoder for all tokens."""
        time = len(tokens)
        x = self.add_cls_and_positions("vivit.embeddings", tokens.reshape(-1, tokens.shape[-1]))  # (N, D)
        for index in range(self.config.num_hidden_layers):
            layer = f"vivit.encoder.layer.{index}"
            if self.config.attention_type == "spatiotemporal":
                x = x + self.attention(f"{layer}.attention", self.norm(f"{layer}.layernorm_before", x))
            elif self.config.attention_type == "factorised_self_attention":
                for axis in self.config.attention_order.split("_"):
                    normed = self.norm(f"{layer}.layernorm_{axis}", x)
                    x = x + self.attention(f"{layer}.attention_{axis}", normed, groups=groups_along(axis, len(x), time))
            else:
                half = self.config.num_attention_heads // 2
                groups = [groups_along(axis, len(x), time) for axis in half * ["time"] + half * ["space"]]
                normed = self.norm(f"{layer}.layernorm_before", x)
                x = x + self.attention(f"{layer}.attention", normed, groups_of_heads=groups)
            x = x + self.mlp(layer, self.norm(f"{layer}.layernorm_after", x))
        return self.pool(self.norm("vivit.layernorm", x))

    def factorised_encoder(self, tokens: Array) -> Array:
        """Section 3.3.2: each time step is encoded by itself, then the sequence of their representations."""
        steps = []
        for step in tokens:
            x = self.add_cls_and_positions("vivit.embeddings", step.reshape(-1, step.shape[-1]))
            steps.append(self.encode("vivit.encoder", "vivit.layernorm", x, self.config.num_hidden_layers))
        x = self.add_cls_and_positions("vivit.temporal_embeddings", np.stack(steps))
        return self.encode("vivit.temporal_encoder", "vivit.temporal_layernorm", x, self.config.num_temporal_layers)

    def encode(self, encoder: str, final_norm: str, x: Array, num_layers: int) -> Array:
        """Section 3.1: layers (N, D), and the representation (D,) of the sequence."""
        for index in range(num_layers):
            layer = f"{encoder}.layer.{index}"
            x = x + self.attention(f"{layer}.attention", self.norm(f"{layer}.layernorm_before", x))
            x = x + self.mlp(layer, self.norm(f"{layer}.layernorm_after", x))
        return self.pool(self.norm(final_norm, x))

    def add_cls_and_positions(self, name: str, x: Array) -> Array:
        if self.config.classifier_pooling == "cls":
            x = np.concatenate([self.tensors[f"{name}.cls_token"][0], x])
        return x + self.tensors[f"{name}.position_embeddings"][0]

    def pool(self, x: Array) -> Array:
        return x[0] if self.config.classifier_pooling == "cls" else x.mean(axis=0)

    def attention(
        self,
        name: str,
        x: Array,
        *,
        groups: list[Array] | None = None,
        groups_of_heads: list[list[Array]] | None = None,
    ) -> Array:
        """Multi-head attention of tokens (N, D) among the members of each group, by default of all.

        Args:
            name: of the module.
            x: tokens.
            groups: indices of tokens that attend to each other.
            groups_of_heads: such groups for each head, which may differ.
        """
        heads = self.config.num_attention_heads
        query, key, value = (self.linear(f"{name}.attention.{part}", x) for part in ("query", "key", "value"))
        width = query.shape[1] // heads
        groups_of_heads = groups_of_heads or [groups or [np.arange(len(x))]] * heads
        output = np.empty_like(value)
        for head, groups in enumerate(groups_of_heads):
            channels = slice(head * width, (head + 1) * width)
            for group in groups:
                q, k, v = (part[group, channels] for part in (query, key, value))
                output[group, channels] = softmax(q @ k.T / np.sqrt(width)) @ v
        return self.linear(f"{name}.output.dense", output)

    def mlp(self, layer: str, x: Array) -> Array:
        return self.linear(f"{layer}.output.dense", gelu_tanh(self.linear(f"{layer}.intermediate.dense", x)))

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0)

    def norm(self, name: str, x: Array) -> Array:
        mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
        normed = (x - mean) / np.sqrt(variance + self.config.layer_norm_eps)
        return normed * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]


def groups_along(axis: str, tokens: int, time: int) -> list[Array]:
    """The indices of tokens at the same place ("time") or of the same time step ("space"), in (time, place) order."""
    indices = np.arange(tokens).reshape(time, -1)  # (T', H' * W')
    return list(indices.T if axis == "time" else indices)


def sampled_frames(frames: int, sampled: int) -> Array:
    """Uniform frame sampling (section 3.2): frames at equal distances from each other and from both ends."""
    if sampled == frames:
        return np.arange(frames)
    return np.rint(np.arange(1, sampled + 1) * frames / (sampled + 1)).astype(int)


def softmax(x: Array) -> Array:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
