"""The benchmark of pruning, on a model that takes seconds."""

import numpy as np
import pytest

from agq_tvm.runtime.perplexity import Difference
from benchmarks import pruning
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("pruning")
    model = write_tiny_model(root / "m", "llama", 2, num_hidden_layers=4)
    return pruning.measure(str(model), "rtn", root, "jargon", [16, 64], 256)


def test_rows_are_complete_and_add_up(found):
    assert len(found["pruning"]) == 2 * 4 * 3 and len(found["choices"]) == 2 * 3 and len(found["errors"]) == 2 * 4
    for line in found["pruning"]:
        assert line["scored"] == 64
        # A share of 0.25 in three layers is none of a chunk of 8 tokens.
        drops_nothing = line["beta"] == 0 or (line["beta"], line["window"]) == (0.25, 16)
        assert drops_nothing or line["pruning_nll"] != 0
        assert ("saved_nll" in line) == (line["beta"] > 0)
        assert (line["quantizing_nll"] == 0) == (line["activations"] == "float")
    rows = {(line["window"], line["beta"], line["activations"]): line for line in found["pruning"]}
    for (window, beta, activation), line in rows.items():
        if beta:
            dense = rows[window, 0.0, activation]["quantizing_nll"]
            assert line["saved_nll"] == pytest.approx(dense - line["quantizing_nll"])
    sparsities = [line["sparsity"] for line in found["errors"] if line["window"] == 64]
    assert sparsities == sorted(sparsities) and sparsities[0] == 0 and 0.2 < sparsities[-1] < 0.75


def test_what_is_chosen_and_counted_makes_a_difference(found):
    by_chunk, whole, anew = (line for line in found["choices"] if line["window"] == 64)
    assert by_chunk["from_chunk_nll"] == 0 != whole["from_chunk_nll"]
    assert anew["from_chunk_nll"] not in (0, whole["from_chunk_nll"])


def test_errors_are_those_of_8_bits(found):
    for line in found["errors"]:
        assert 1e-3 < line["per token and group_error"] < line["static, TRIP_error"] < 0.2


def test_layers_are_in_the_deeper_parts():
    assert pruning.schedules_for(30)[0].layers == (11, 16, 23)
    assert pruning.schedules_for(2)[1].layers == (1, 2)


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([(0.3, 0.1), (0.1, 0.1)], "cheaper with 1 of 2 schedules"),
        ([(-0.3, 0.1), (-0.2, 0.1 - 1e-9)], "dearer with 2 of 2"),
        ([(0.1, 0.1), (-0.1, 0.1)], "neither cheaper nor dearer"),
        ([(0.3, 0.1), (-0.3, 0.1)], "cheaper with some"),
    ],
)
def test_verdicts_ask_for_two_standard_errors(differences, words):
    assert words in pruning.verdict([Difference(*each) for each in differences])


def test_table_has_a_cell_for_everything(found):
    for name in ("pruning", "choices", "errors"):
        lines = pruning.table(found[name])
        assert len({len(line) for line in lines}) == 1 and len(lines) == 1 + len(found[name])
    assert np.isfinite([line["perplexity"] for line in found["pruning"]]).all()
