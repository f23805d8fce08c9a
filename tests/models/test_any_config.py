"""Whatever stands in a config.json: a description, or a refusal in one sentence."""

from hypothesis import given, settings
from hypothesis import strategies as st

from agq_tvm.errors import AgqError
from agq_tvm.models.registry import describe
from tests.tiny import FAMILIES, tiny_config

OPTIONAL = ("rope_parameters", "rope_scaling", "n_embed", "sliding_window", "use_sliding_window", "attention_bias")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-1, 300) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "factor"]), inner),
    max_leaves=3,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FAMILIES), st.data())
def test_one_damaged_value(family, data):
    config = tiny_config(family)
    name = data.draw(st.sampled_from([*config, *OPTIONAL]))
    try:
        described = describe(config | {name: data.draw(VALUES)})
    except AgqError as error:
        assert str(error).startswith("config.json") and "\n" not in str(error)
        return
    assert all(sum(linear.rows) > 0 < linear.in_features for linear in described.linears)
    assert described.num_heads * described.head_dim == described.linears[1].in_features
