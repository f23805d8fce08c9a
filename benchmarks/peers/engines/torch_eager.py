"""PyTorch: int8 weights with dynamic int8 activations (x86 and oneDNN kernels), bfloat16 and float32.

Models run as transformers' Llama: SDPA, a growing cache, logits of the last position only.
"""

from pathlib import Path

import numpy as np

from benchmarks.peers.base import Form, Model, ModelForm, Operands, Product, copy_of

ENVIRONMENT = "shared"
PACKAGE = "torch"
PRODUCTS = (
    Form("torch int8 (onednn)", "int8"),
    Form("torch int8 (x86)", "int8"),
    Form("torch bfloat16", "float"),
    Form("torch float32", "float"),
)
MODELS = (ModelForm("torch float32", 32, "float32", 32), ModelForm("torch bfloat16", 16, "bfloat16", 16))
_DTYPES = {"torch bfloat16": "bfloat16", "torch float32": "float32"}


class Product(Product):
    """See `benchmarks.peers.base.Product`."""

    def prepare(self, operands: Operands) -> None:
        """See `Product.prepare`."""
        import torch

        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)
        self._x = torch.from_numpy(operands.x)
        w = operands.w
        if self.form.kind == "int8":
            self._calls = self._int8(torch, w, operands.copies)
            self.stored_bytes = w.size + 4 * len(w)
        else:
            dtype = getattr(torch, _DTYPES[self.form.name])
            copies = (torch.from_numpy(copy_of(w, i)) for i in range(operands.copies))
            self._calls = [self._float(torch, copy.to(dtype)) for copy in copies]
            self.stored_bytes = w.size * dtype.itemsize

    def _int8(self, torch, w: np.ndarray, copies: int) -> list:
        torch.backends.quantized.engine = "onednn" if "onednn" in self.form.name else "x86"
        scales = np.abs(w).max(1) / np.float32(127)
        codes = np.rint(w / scales[:, None]).astype("int8")
        zeros, calls = torch.zeros(len(w), dtype=torch.int64), []
        for i in range(copies):
            moved = [torch.from_numpy(copy_of(array, i)) for array in (codes, scales)]
            quantized = torch._make_per_channel_quantized_tensor(moved[0], moved[1].double(), zeros, 0)
            packed = torch.ops.quantized.linear_prepack(quantized, None)
            # Activations in all of their range: halving it is for processors without VNNI.
            calls.append(lambda packed=packed: torch.ops.quantized.linear_dynamic(self._x, packed, False))
        return calls

    def _float(self, torch, w):
        linear = torch.nn.functional.linear
        return lambda: linear(self._x.to(w.dtype), w).to(torch.float32)

    def run(self) -> None:
        """See `Product.run`."""
        self._first = self._calls[0]()
        for call in self._calls[1:]:
            call()

    def result(self) -> np.ndarray:
        """See `Product.result`."""
        return self._first.numpy()


class Model(Model):
    """See `benchmarks.peers.base.Model`."""

    def __init__(self, form: ModelForm, threads: int, work: Path, source: Path, context: int):
        import torch
        from transformers import DynamicCache, LlamaForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch, self._cache_kind = torch, DynamicCache
        dtype = getattr(torch, _DTYPES[form.name])
        self._model = LlamaForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa").eval()

    def prefill(self, tokens: list[int]) -> None:
        """See `Model.prefill`."""
        self._cache = self._cache_kind(config=self._model.config)
        self._read(tokens)

    def decode(self, token: int) -> None:
        """See `Model.decode`."""
        self._read([token])

    def _read(self, tokens: list[int]) -> None:
        given = self._torch.tensor([tokens])
        made = self._model(input_ids=given, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._last = made.logits[0, -1]

    def last(self) -> np.ndarray:
        """See `Model.last`."""
        return self._last.float().numpy()
