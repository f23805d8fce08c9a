"""A look inside the torch reference."""

from torch import Tensor

from agq_tvm.quantize.reference import ReferenceModel


def watch_values(model: ReferenceModel) -> list[list[Tensor]]:
    """Return lists, one for each layer, that later passes of a model with quantized attention append values to.

    Values are as attention is given them, float32 [KV, T, D].
    """
    found = [[] for _ in range(model.config.num_layers)]

    def watched(index: int):
        layer = model._layer(index)

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            found[index].append(v)
            return layer.attend(q, k, v, bias)

        return layer._replace(attend=attend)

    model._layer = [watched(index) for index in range(model.config.num_layers)].__getitem__
    return found
