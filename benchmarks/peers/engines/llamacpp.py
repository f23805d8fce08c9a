"""llama.cpp: its products through ggml, its models through llama.cpp's own interface.

Repacked weights are what it takes by default on processors that have kernels for them; for Q4_K larger numbers of
rows are faster without.
"""

import ctypes
from pathlib import Path

import numpy as np

from benchmarks.peers.base import Form, Model, ModelForm, Operands, Product, copy_of
from benchmarks.peers.conversion import write_gguf

ENVIRONMENT = "shared"
PACKAGE = "llama-cpp-python"
PRODUCTS = (
    Form("llama.cpp Q4_0", "g32"),
    Form("llama.cpp Q4_K", "g32"),
    Form("llama.cpp Q4_K, not repacked", "g32"),
    Form("llama.cpp Q8_0", "int8"),
)
MODELS = (
    ModelForm("llama.cpp Q4_0", 4, "Q6_K or Q8_0", 8),
    ModelForm("llama.cpp Q4_0, 4-bit head", 4, "Q4_0", 4),
    ModelForm("llama.cpp Q4_1", 4, "Q6_K or Q8_0", 8, kept=True),
    ModelForm("llama.cpp Q4_K_M", 4, "Q6_K or Q8_0", 8),
    ModelForm("llama.cpp Q4_K_M, not repacked", 4, "Q6_K or Q8_0", 8),
    ModelForm("llama.cpp Q8_0", 8, "Q8_0", 8),
)
_F32 = 0
_TYPES = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The functions of ggml that a product takes, with their types."""

    def __init__(self):
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
        self._libraries = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in names]
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        long = ctypes.c_int64
        self.init = self._function("ggml_init", pointer, _InitParams)
        self.free = self._function("ggml_free", None, pointer)
        self.tensor_overhead = self._function("ggml_tensor_overhead", size)
        self.graph_overhead = self._function("ggml_graph_overhead_custom", size, size, ctypes.c_bool)
        self.new_tensor = self._function("ggml_new_tensor_2d", pointer, pointer, integer, long, long)
        self.mul_mat = self._function("ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.new_graph = self._function("ggml_new_graph_custom", pointer, pointer, size, ctypes.c_bool)
        self.expand = self._function("ggml_build_forward_expand", None, pointer, pointer)
        self.quantize = self._function(
            "ggml_quantize_chunk", size, integer, pointer, pointer, long, long, long, pointer
        )
        self.row_size = self._function("ggml_row_size", size, integer, long)
        self.cpu = self._function("ggml_backend_cpu_init", pointer)
        self.set_threads = self._function("ggml_backend_cpu_set_n_threads", None, pointer, integer)
        self.alloc = self._function("ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
        self.free_buffer = self._function("ggml_backend_buffer_free", None, pointer)
        self.tensor_set = self._function("ggml_backend_tensor_set", None, pointer, pointer, size, size)
        self.tensor_get = self._function("ggml_backend_tensor_get", None, pointer, pointer, size, size)
        self.compute = self._function("ggml_backend_graph_compute", integer, pointer, pointer)
        self.plain_buffers = self._function("ggml_backend_cpu_buffer_type", pointer)
        self.buffer_name = self._function("ggml_backend_buft_name", ctypes.c_char_p, pointer)
        self._registry = self._function("ggml_backend_cpu_reg", pointer)
        self._device = self._function("ggml_backend_reg_dev_get", pointer, pointer, size)
        self._address = self._function("ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)

    def _function(self, name: str, result, *arguments):
        function = next(getattr(library, name) for library in self._libraries if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        return function

    def repacking_buffers(self) -> int:
        """Return the kind of buffer whose weights are repacked.

        Raises
        ------
        RuntimeError
            If this build has none.
        """
        registry = self._registry()
        address = self._address(registry, b"ggml_backend_dev_get_extra_bufts")
        list_kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        kinds = list_kinds(self._device(registry, 0))
        for i in range(16):
            if not kinds[i]:
                break
            if self.buffer_name(kinds[i]) == b"CPU_REPACK":
                return kinds[i]
        raise RuntimeError("this build of llama.cpp repacks nothing")


class Product(Product):
    """See `benchmarks.peers.base.Product`."""

    _made = ()

    def prepare(self, operands: Operands) -> None:
        """See `Product.prepare`."""
        self._ggml = g = Ggml()
        name = self.form.name.split()[1].rstrip(",")
        kind, plain = _TYPES[name], name == "Q8_0" or "not repacked" in self.form.name
        x, (columns, channels) = operands.x, operands.w.shape
        packed = self._quantized(kind, operands.w)
        self.stored_bytes = packed.nbytes
        copies = operands.copies
        weights = self._context(copies)
        tensors = [g.new_tensor(weights, kind, channels, columns) for _ in range(copies)]
        buffers = g.plain_buffers() if plain else g.repacking_buffers()
        self._made = [(weights, g.alloc(weights, buffers))]
        for i, tensor in enumerate(tensors):
            data = np.ascontiguousarray(copy_of(packed, i))
            g.tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
        context = self._context(2 * copies, graph=True)
        inputs = [g.new_tensor(context, _F32, channels, len(x)) for _ in range(copies)]
        outputs = [g.mul_mat(context, *pair) for pair in zip(tensors, inputs, strict=True)]
        self._graph = g.new_graph(context, 4 * copies, False)
        for output in outputs:
            g.expand(self._graph, output)
        self._made.append((context, g.alloc(context, g.plain_buffers())))
        for tensor in inputs:
            g.tensor_set(tensor, x.ctypes.data, 0, x.nbytes)
        self._output, self._y = outputs[0], np.empty((len(x), columns), "float32")
        self._backend = g.cpu()
        g.set_threads(self._backend, self.threads)

    def _context(self, tensors: int, graph: bool = False) -> int:
        g = self._ggml
        size = tensors * g.tensor_overhead() + (g.graph_overhead(2 * tensors, False) if graph else 0)
        return g.init(_InitParams(size + 4096, None, True))

    def _quantized(self, kind: int, w: np.ndarray) -> np.ndarray:
        rows, channels = w.shape
        packed = np.empty((rows, self._ggml.row_size(kind, channels)), "uint8")
        self._ggml.quantize(kind, w.ctypes.data, packed.ctypes.data, 0, rows, channels, None)
        return packed

    def run(self) -> None:
        """See `Product.run`."""
        if status := self._ggml.compute(self._backend, self._graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def result(self) -> np.ndarray:
        """See `Product.result`."""
        self._ggml.tensor_get(self._output, self._y.ctypes.data, 0, self._y.nbytes)
        return self._y

    def __del__(self):
        for context, buffer in self._made:
            self._ggml.free_buffer(buffer)
            self._ggml.free(context)


class Model(Model):
    """See `benchmarks.peers.base.Model`."""

    def __init__(self, form: ModelForm, threads: int, work: Path, source: Path, context: int):
        import llama_cpp

        self._library = llama_cpp
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_extra_bufts = "not repacked" not in form.name
        path = str(self._quantized(form, work, source)).encode()
        if not (model := llama_cpp.llama_model_load_from_file(path, options)):
            raise RuntimeError(f"llama.cpp does not load {path.decode()}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, settings)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def _quantized(self, form: ModelForm, work: Path, source: Path) -> Path:
        """Convert the model, unless that was done before."""
        kind = form.name.split()[1].rstrip(",")
        head = "-head-q4_0" if form.head == "Q4_0" else ""
        whole, target = (work / f"{source.name}{suffix}.gguf" for suffix in ("", f"-{kind}{head}"))
        if target.exists():
            return target
        if not whole.exists():
            write_gguf(source, whole)
        options = self._library.llama_model_quantize_default_params()
        options.ftype = getattr(self._library, f"LLAMA_FTYPE_MOSTLY_{kind}")
        options.nthread = 1
        if head:
            options.output_tensor_type = options.token_embedding_type = _TYPES["Q4_0"]
        part = target.with_suffix(".part")
        if self._library.llama_model_quantize(str(whole).encode(), str(part).encode(), ctypes.byref(options)):
            raise RuntimeError(f"llama.cpp does not quantize {whole}")
        part.rename(target)
        return target

    def prefill(self, tokens: list[int]) -> None:
        """See `Model.prefill`."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)
        self._read(tokens)

    def decode(self, token: int) -> None:
        """See `Model.decode`."""
        self._read([token])

    def _read(self, tokens: list[int]) -> None:
        array = (self._library.llama_token * len(tokens))(*tokens)
        batch = self._library.llama_batch_get_one(array, len(tokens))
        if status := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def last(self) -> np.ndarray:
        """See `Model.last`."""
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self._vocab_size,)).copy()
