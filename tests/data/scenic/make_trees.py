"""Makes the checkpoints in this folder with the original's own code. README.md has the command.

Every checkpoint is a small model in which all parameters are random, saved by flax.training.checkpoints. `expected.npz`
has two clips, and the logits that the original computes for them with each checkpoint.
"""

import argparse
import shutil
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.training import checkpoints

FOLDER = Path(__file__).parent
# scenic imports TensorFlow for file systems and data sets, which its models do not use.
for name in ("tensorflow", "tensorflow.io"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].gfile = sys.modules[name].io = None

CLIPS, FRAMES, HEIGHT, WIDTH = 2, 8, 16, 16
LABELS, HIDDEN, MLP = 5, 16, 24

# Name -> changes to MODEL, and how it is saved.
TUBELET = {"method": "3d_conv"}
UNIFORM_FRAMES = {"method": "temporal_sampling", "n_sampled_frames": 4}
SELF_ATTENTION = "factorized_self_attention_block"
CHECKPOINTS = {
    "spatiotemporal_cls": {},
    "spatiotemporal_mean": {"classifier": "gap", "saved": "params"},
    "spatiotemporal_uniform_frames": {"patches": (8, 4), "encoding": UNIFORM_FRAMES},
    "factorised_encoder_cls": {"type": "factorized_encoder"},
    "factorised_encoder_mean": {
        "type": "factorized_encoder",
        "classifier": "gap",
        "saved": "params",
        "chunk_bytes": 999,
    },
    "factorised_encoder_uniform_frames": {
        "type": "factorized_encoder",
        "patches": (8, 4),
        "encoding": UNIFORM_FRAMES,
        "dtype": "bfloat16",
    },
    "factorised_self_attention_time_space": {"type": SELF_ATTENTION, "order": "time_space", "classifier": "gap"},
    "factorised_self_attention_space_time": {
        "type": SELF_ATTENTION,
        "order": "space_time",
        "classifier": "gap",
        "saved": "params",
        "dtype": "float16",
    },
    "factorised_dot_product": {"type": "factorized_dot_product_attention", "heads": 4, "classifier": "gap"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenic", type=Path, help="a checkout of github.com/google-research/scenic")
    sys.path.insert(0, str(parser.parse_args().scenic))
    jax.config.update("jax_default_matmul_precision", "highest")
    clips = np.random.default_rng(0).integers(0, 256, (CLIPS, FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    logits = {name: make_checkpoint(name, clips, **options) for name, options in CHECKPOINTS.items()}
    np.savez_compressed(FOLDER / "expected.npz", clips=clips, **logits)


def make_checkpoint(
    name: str,
    clips: np.ndarray,
    *,
    saved: str = "optimizer",
    dtype: str = "float32",
    chunk_bytes: int = 2**30,
    **options,
) -> np.ndarray:
    """Saves a checkpoint and returns the logits, float32 (CLIPS, LABELS)."""
    model = build_model(**options)
    inputs = jnp.asarray(clips, jnp.float32) * (2.0 / 255.0) - 1.0  # processors.normalize_image of DMVR
    seed = list(CHECKPOINTS).index(name)
    variables = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), inputs, train=False))
    rng = np.random.default_rng(seed)
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: random_parameter(rng, path, leaf), variables["params"])
    params = jax.tree_util.tree_map(lambda leaf: leaf.astype(dtype), params)
    save(name, params, saved=saved, chunk_bytes=chunk_bytes)
    as_float32 = jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.float32), params)
    return np.asarray(model.apply({"params": as_float32}, inputs, train=False))


def build_model(
    *,
    type: str = "spacetime",
    order: str | None = None,
    classifier: str = "token",
    patches: tuple[int, ...] = (8, 4, 2),  # (height, width, frames)
    encoding: dict = TUBELET,
    heads: int = 2,
) -> flax.linen.Module:
    from scenic.projects.vivit import model

    attention = {"type": type} if order is None else {"type": type, "attention_order": order}
    widths = {"mlp_dim": MLP, "num_heads": heads}
    config = {
        "model": {
            "attention_config": attention,
            "temporal_encoding_config": encoding,
            "patches": {"size": patches},
            "hidden_size": HIDDEN,
            "representation_size": None,
            "classifier": classifier,
            "spatial_transformer": {**widths, "num_layers": 2},
            "temporal_transformer": {**widths, "num_layers": 1},
            **widths,
            "num_layers": 2,
        }
    }
    vivit = model.ViViTClassificationModel.__new__(model.ViViTClassificationModel)
    vivit.config = ml_collections.ConfigDict(config)
    vivit.dataset_meta_data = {"num_classes": LABELS}
    return vivit.build_flax_model()


def random_parameter(rng: np.random.Generator, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Random values also for what is initialized with 0 or 1: biases, LayerNorm, CLS, the classifier."""
    name = path[-1].key
    values = rng.standard_normal(leaf.shape)
    if name == "kernel":
        values *= 2 * np.prod(leaf.shape[: -2 if len(leaf.shape) == 3 and leaf.shape[0] == HIDDEN else -1]) ** -0.5
    elif name == "scale":
        values = 1 + 0.3 * values
    else:
        values *= 0.5
    return jnp.asarray(values, jnp.float32)


def save(name: str, params: dict, *, saved: str, chunk_bytes: int) -> None:
    """Saves as scenic does: today's layout has `params`, the one of the released checkpoints `optimizer`."""
    rng, statistics = jax.random.PRNGKey(0), {"batch_stats": {"mean": np.ones(3, np.float32)}}
    step = np.int32(100)
    # The full optimizer states would double the size of this folder.
    momentum = {"output_projection": params["output_projection"]}
    if saved == "params":  # scenic.train_lib.train_utils.TrainState
        state = {"opt_state": ({"momentum": momentum},), "params": params, "global_step": step}
        state |= {"model_state": statistics, "rng": rng, "metadata": None}
    else:
        optimizer = {"state": {"step": step, "param_states": momentum}, "target": params}
        state = {"global_step": step, "optimizer": optimizer, "model_state": statistics, "rng": rng}
    flax.config.update("flax_use_orbax_checkpointing", False)
    with tempfile.TemporaryDirectory() as temporary:
        with mock.patch.object(flax.serialization, "MAX_CHUNK_SIZE", chunk_bytes):
            path = checkpoints.save_checkpoint(temporary, state, step=int(step))
        shutil.copy(path, FOLDER / name)


if __name__ == "__main__":
    main()
