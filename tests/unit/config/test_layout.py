"""A layout's name: flags and JSON, and one line for a wrong one."""

import pytest

from megagpt.config.layout import Layout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tp2-xx", "'xx' in layout 'tp2-xx' is no word"),
        ("tp2-tp4", "says tensor_parallel_size twice"),
        ("tp0", "'tp0' in layout 'tp0' must be at least 1"),
        ("", "'' in layout '' is no word"),
    ],
)
def test_a_wrong_layout_name_is_one_line(name, message):
    with pytest.raises(ValueError) as error:
        Layout.parse(name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_layout_name_gives_flags_and_json():
    layout = Layout.parse("tp2-sp-dp3-zero3-full-offload_nvme")
    assert layout.world_size == 6
    words = " ".join(layout.arguments())
    assert "tensor_parallel_size 2" in words and "sequence_parallel true" in words
    assert "activation_checkpointing full" in words
    zero = layout.ds_config()["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_optimizer"] == {"device": "nvme"}
    assert zero["offload_param"] == {"device": "nvme", "max_in_cpu": 0}
    only = Layout.parse("dp2-zero2-offload_optimizer_cpu").ds_config()["zero_optimization"]
    assert only == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
