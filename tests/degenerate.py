"""Channels that calibration can make nothing of."""

from pathlib import Path

from safetensors.numpy import load_file, save_file

ZERO, CONSTANT, OUTLIER, DEAD_GROUP = 0, 1, 2, slice(64, 96)


def spoil(path: Path) -> None:
    """Give an OPT model inputs that are always zero, constant or huge, and weights that are all zero or all alike."""
    tensors = load_file(path / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith("layer_norm.weight") and "layers." in name:
            values[[ZERO, CONSTANT]] = values[DEAD_GROUP] = 0
            values[OUTLIER] = 30
        elif name.endswith("layer_norm.bias") and "layers." in name:
            values[ZERO] = values[DEAD_GROUP] = 0
            values[CONSTANT] = 2
        elif name.endswith("fc1.weight"):
            values[[ZERO, CONSTANT]] = 0
            values[:, OUTLIER] /= 30
        elif name.endswith("fc1.bias"):
            values[[ZERO, CONSTANT]] = -1, 5  # before a ReLU
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            values[:, OUTLIER] /= 30
            values[:, 5] = 0  # a dead column, and a dead row
            values[7] = 0
        elif name.endswith("out_proj.weight"):
            values[:8] = 0.25
    save_file(tensors, path / "model.safetensors")
