"""onnxruntime-genai: models converted by its own builder, activations of 8 bits (accuracy level 4)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.peers.base import Model, ModelForm

ENVIRONMENT = "shared"
PACKAGE = "onnxruntime-genai"
MODELS = (
    ModelForm("onnxruntime-genai g32", 4, "int8", 8),
    ModelForm("onnxruntime-genai g32, 4-bit head", 4, "int4", 4),
    ModelForm("onnxruntime-genai g128", 4, "int8", 8),
)


class Model(Model):
    """See `benchmarks.peers.base.Model`."""

    def __init__(self, form: ModelForm, threads: int, work: Path, source: Path, context: int):
        import onnxruntime_genai

        self._library, self._context = onnxruntime_genai, context
        path = self._converted(form, work, source)
        config = onnxruntime_genai.Config(str(path))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)

    def _converted(self, form: ModelForm, work: Path, source: Path) -> Path:
        """Convert the model, unless that was done before."""
        size = form.name.split()[1].strip("g,")
        target = work / f"{source.name}-g{size}-{form.head}"
        if (target / "genai_config.json").exists():
            return target
        part, scratch = target.with_suffix(".part"), target.with_suffix(".scratch")
        shutil.rmtree(part, ignore_errors=True)
        options = [f"block_size={size}", "accuracy_level=4", "prune_lm_head=true"]
        options += ["matmul_mixed_precision=last_matmul:int8"] * (form.head == "int8")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", source, "-i", source, "-o", part]
        command += ["-p", "int4", "-e", "cpu", "-c", scratch, "--extra_options", *options]
        subprocess.run(command, check=True)
        shutil.rmtree(scratch, ignore_errors=True)
        part.rename(target)
        return target

    def prefill(self, tokens: list[int]) -> None:
        """See `Model.prefill`."""
        options = self._library.GeneratorParams(self._model)
        options.set_search_options(max_length=self._context, min_length=0)
        self._generator = self._library.Generator(self._model, options)
        self._generator.append_tokens(np.array([tokens], "int32"))

    def decode(self, token: int) -> None:
        """See `Model.decode`."""
        self._generator.append_tokens(np.array([[token]], "int32"))

    def last(self) -> np.ndarray:
        """See `Model.last`."""
        return np.asarray(self._generator.get_logits()).reshape(-1)
