"""Parameter names: ours, the published ones, and the conversion between them.

Published checkpoints store query, key and value separately. Our attention has one fused matrix and needs only one
multiplication. Tensors are fused and split here, when weights are loaded and saved, never in a forward pass.
"""

import os
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from handler.checkpoints.hub import CheckpointMismatchError

PREFIX = "vivit."  # precedes every published name of a classification model except those of the classifier
HEADS = ("vivit.pooler.", "classifier.")  # parameters that only some models on the same encoder have

# Our name, the published name, and the name that transformers 5 has in memory. ".weight" or ".bias" may follow. Rows
# with the same name of ours are parts of one tensor, stacked in this order into (3 * D, D).
_LAYER_NAMES = (
    ("layernorm_before", "layernorm_before", "layernorm_before"),
    ("attention.qkv", "attention.attention.query", "attention.q_proj"),
    ("attention.qkv", "attention.attention.key", "attention.k_proj"),
    ("attention.qkv", "attention.attention.value", "attention.v_proj"),
    ("attention.output", "attention.output.dense", "attention.o_proj"),
    ("layernorm_after", "layernorm_after", "layernorm_after"),
    ("mlp.up", "intermediate.dense", "mlp.fc1"),
    ("mlp.down", "output.dense", "mlp.fc2"),
)
# What transformers does not have has one published name only: the layers of factorised self-attention, which have a
# LayerNorm and an attention for each axis, and the second encoder of the factorised encoder.
_AXIS_NAMES = tuple(
    (f"{ours}_{axis}{rest}", f"{ours}_{axis}{published}", f"{ours}_{axis}{published}")
    for axis in ("time", "space")
    for ours, rest, published in (
        ("layernorm", "", ""),
        ("attention", ".qkv", ".attention.query"),
        ("attention", ".qkv", ".attention.key"),
        ("attention", ".qkv", ".attention.value"),
        ("attention", ".output", ".output.dense"),
    )
)
TEMPORAL = "temporal_"  # begins every published name of the second encoder, after PREFIX
# {} is the layer number.
NAMES = (
    ("embedding.cls_token", "embeddings.cls_token", "embeddings.cls_token"),
    ("embedding.position_embeddings", "embeddings.position_embeddings", "embeddings.position_embeddings"),
    ("embedding.projection", "embeddings.patch_embeddings.projection", "embeddings.patch_embeddings.projection"),
    *(
        (f"layers.{{}}.{ours}", f"encoder.layer.{{}}.{published}", f"layers.{{}}.{in_memory}")
        for ours, published, in_memory in (*_LAYER_NAMES, *_AXIS_NAMES)
    ),
    ("layernorm", "layernorm", "layernorm"),
    *(
        (f"temporal.{ours}", TEMPORAL + published, TEMPORAL + published)
        for ours, published in (
            ("embedding.cls_token", "embeddings.cls_token"),
            ("embedding.position_embeddings", "embeddings.position_embeddings"),
            *((f"layers.{{}}.{ours}", f"encoder.layer.{{}}.{published}") for ours, published, _ in _LAYER_NAMES),
            ("layernorm", "layernorm"),
        )
    ),
    ("pooler", "pooler.dense", "pooler.dense"),
    ("classifier", "classifier", "classifier"),
)
# Patterns are names without prefix and suffix, with {} for the layer number.
_PUBLISHED_PATTERNS = {ours: [row[1] for row in NAMES if row[0] == ours] for ours, _, _ in NAMES}
# Pattern of either foreign naming -> our pattern, and the index of the part in the fused tensor.
_OUR_PATTERNS = {
    pattern: (ours, _PUBLISHED_PATTERNS[ours].index(published))
    for ours, published, in_memory in NAMES
    for pattern in (published, in_memory)
}


class _Name(NamedTuple):
    """The parts of a name: "vivit.layers.7.mlp.up.bias" is ("vivit.", "layers.{}.mlp.up", "7", ".bias")."""

    prefix: str
    pattern: str
    layer: str
    suffix: str

    @classmethod
    def parse(cls, name: str) -> "_Name":
        prefix, module, suffix = _groups(r"(vivit\.)?(.*?)(\.weight|\.bias)?", name)
        before, layer, after = _groups(r"(.*?layers?\.)?(\d*)(.*)", module)
        return cls(prefix, f"{before}{{}}{after}" if layer else module, layer, suffix)

    def with_pattern(self, pattern: str) -> str:
        """Returns the whole name, with another pattern."""
        return self.prefix + pattern.format(self.layer) + self.suffix


def _groups(pattern: str, text: str) -> tuple[str, ...]:
    """Returns the groups of a pattern that matches any text; those that did not take part are empty."""
    match = re.fullmatch(pattern, text, re.DOTALL)
    assert match is not None
    return match.groups("")


def to_published(ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts our names to the published ones.

    Works for weights, gradients and optimizer states, with or without the "vivit." prefix. The parts of a fused
    tensor are views of it. Names that are not in NAMES are kept.
    """
    published = {}
    for full_name, tensor in ours.items():
        name = _Name.parse(full_name)
        patterns = _PUBLISHED_PATTERNS.get(name.pattern)
        if patterns is None:
            published[full_name] = tensor
            continue
        for pattern, part in zip(patterns, tensor.chunk(len(patterns)) if len(patterns) > 1 else [tensor]):
            published[name.with_pattern(pattern)] = part
    return published


def from_published(published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts published names, or those that transformers 5 has in memory, to ours: the inverse of `to_published`.

    Raises:
        CheckpointMismatchError: Some parts of a fused tensor are missing.
    """
    ours: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for full_name, tensor in published.items():
        name = _Name.parse(full_name)
        if name.pattern not in _OUR_PATTERNS:
            ours[full_name] = tensor
            continue
        our_pattern, part = _OUR_PATTERNS[name.pattern]
        parts.setdefault(name.with_pattern(our_pattern), {})[part] = tensor
    for our_name, tensors in parts.items():
        name = _Name.parse(our_name)
        names = [name.with_pattern(pattern) for pattern in _PUBLISHED_PATTERNS[name.pattern]]
        if missing := [part_name for part, part_name in enumerate(names) if part not in tensors]:
            raise CheckpointMismatchError(f"parts of {our_name} are missing: {', '.join(missing)}")
        in_order = [tensors[part] for part in range(len(names))]
        ours[our_name] = in_order[0] if len(in_order) == 1 else torch.cat(in_order)  # (3 * D, D) or (3 * D,)
    return ours


def canonical_name(name: str) -> str:
    """Returns the published name, with prefix, for a name in either foreign naming; unknown names are kept."""
    _, pattern, layer, suffix = _Name.parse(name)
    if pattern not in _OUR_PATTERNS:
        return name
    ours, part = _OUR_PATTERNS[pattern]
    prefix = "" if ours == "classifier" else PREFIX
    return _Name(prefix, "", layer, suffix).with_pattern(_PUBLISHED_PATTERNS[ours][part])


def match_state_dict(
    published: Mapping[str, torch.Tensor],
    model_state: Mapping[str, torch.Tensor],
    *,
    source: str | os.PathLike[str],
) -> dict[str, torch.Tensor]:
    """Converts a checkpoint's tensors to the names of a model, and checks that they fit it.

    A pooler or classifier that the model lacks is dropped. Everything else must match.

    Args:
        published: tensors by canonical names, as returned by `load_state_dict`.
        model_state: state dict of the model. Only names and shapes are used, so it may be on the "meta" device.
        source: the checkpoint, for the error message.

    Returns:
        The tensors by the names of `model_state`.

    Raises:
        CheckpointMismatchError: The tensors are those of another of the paper's models. Or tensors are missing,
            unexpected, of the wrong shape or not floating-point; the message lists all by their published names.
    """
    expected = {canonical_name(name): tensor for name, tensor in to_published(model_state).items()}
    for head in HEADS:
        if not any(name.startswith(head) for name in expected):
            published = {name: tensor for name, tensor in published.items() if not name.startswith(head)}
    _check_architecture(published, expected, source)
    problems = [f"missing: {name}" for name in expected if name not in published]
    problems += [f"unexpected: {name}" for name in published if name not in expected]
    for name, tensor in published.items():
        shape, expected_shape = tuple(tensor.shape), tuple(expected.get(name, tensor).shape)
        if shape != expected_shape:
            problems.append(f"wrong shape: {name}: expected {expected_shape}, got {shape}")
        if not tensor.is_floating_point():
            problems.append(f"wrong type: {name}: expected floating point, got {tensor.dtype}")
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointMismatchError(f"the weights of {source} do not fit the model:\n  {lines}")
    ours = from_published(published)
    return {name: ours[name if name in ours else PREFIX + name] for name in model_state}


def _check_architecture(
    published: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], source: str | os.PathLike[str]
) -> None:
    """Raises CheckpointMismatchError if the tensors, by published names, are those of another of the paper's models."""
    cls, positions = PREFIX + "embeddings.cls_token", PREFIX + "embeddings.position_embeddings"
    shapes = [getattr(state.get(positions), "shape", None) for state in (published, expected)]
    expects_cls = cls in expected
    has_cls = expects_cls if shapes[0] == shapes[1] else cls in published  # otherwise only CLS is missing or unexpected
    found, wanted = _architecture(published, has_cls=has_cls), _architecture(expected, has_cls=expects_cls)
    if found != wanted:
        raise CheckpointMismatchError(
            f"the weights of {source} are those of {found}, but its configuration has {wanted}"
        )


def _architecture(names: Collection[str], *, has_cls: bool) -> str:
    """Describes which of the paper's models has tensors of these published names."""
    pooling = f"classifier_pooling {'cls' if has_cls else 'mean'!r}"
    if any(name.startswith(PREFIX + TEMPORAL) for name in names):
        return f"attention_type 'factorised_encoder' and {pooling}"
    if any(".attention_time." in name for name in names):
        return f"attention_type 'factorised_self_attention' and {pooling}"
    if has_cls:
        return f"attention_type 'spatiotemporal' and {pooling}"
    return f"attention_type 'factorised_dot_product', or 'spatiotemporal' and {pooling}"
