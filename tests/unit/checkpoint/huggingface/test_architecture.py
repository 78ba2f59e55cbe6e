"""Settings of theirs and of ours: what has no like is refused, and both versions are read."""

import json

import pytest
from hf_models import OURS, edit, gpt2, llama, our_checkpoint, qwen3, saved

from megagpt.checkpoint.huggingface.architecture import model_config
from megagpt.checkpoint.huggingface.convert import export_checkpoint, import_checkpoint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(qk_norm=True), "model.qk_norm=True"),
        (dict(bias=False), "model.bias=False"),
        (dict(num_kv_heads=2), "model.num_kv_heads=2"),
        (dict(activation="swiglu"), "model.activation=swiglu"),
        (dict(OURS["llama"], normalization="layernorm"), "model.normalization=layernorm"),
        (dict(OURS["qwen3"], bias=True), "model.bias=True"),
    ],
)
def test_a_model_without_architecture_is_refused(settings, message, tmp_path):
    step = our_checkpoint(tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=message) as refused:
        export_checkpoint(step, tmp_path / "theirs")
    assert "\n" not in str(refused.value) and "to export" in str(refused.value)


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("build", "values", "message"),
    [
        (gpt2, dict(activation_function="relu"), "activation_function=relu"),
        (gpt2, dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (gpt2, dict(model_type="gpt_neox"), "model_type=gpt_neox"),
        (gpt2, dict(n_inner=95.5), "n_inner=95.5"),
        (gpt2, dict(n_layer="3"), "n_layer=3"),
        (gpt2, dict(n_head=5), "num_attention_heads=5"),
        (gpt2, dict(n_layer=2), "has the unknown tensor transformer.h.2"),
        (gpt2, dict(n_layer=4), "lacks transformer.h.3"),
        (gpt2, dict(n_positions=14), r"transformer.wpe.weight of shape \(13, 24\)"),
        (gpt2, dict(tie_word_embeddings=False), "lacks lm_head.weight"),
        (gpt2, dict(quantization_config={"bits": 4}), "quantization_config"),
        (llama, dict(hidden_act="gelu"), "hidden_act=gelu"),
        (llama, dict(rope_parameters=SCALED), "rope_parameters"),
        (llama, dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling"),
        (llama, dict(attention_bias=True), "mlp_bias=False"),
        (llama, dict(head_dim=16), "head_dim=16"),
        (llama, dict(max_position_embeddings=None), "max_position_embeddings=None"),
        (llama, dict(tie_word_embeddings=True), "is not the embedding"),
        (qwen3, dict(head_dim=None), "head_dim=128"),
        (qwen3, dict(use_sliding_window=True), "use_sliding_window=True"),
        (qwen3, dict(layer_types=["sliding_attention"] * 3), "layer_types=sliding_attention"),
    ],
)
def test_what_our_model_does_not_compute_is_refused(build, values, message, tmp_path):
    folder = edit(saved(build(), tmp_path / "theirs"), **values)
    with pytest.raises(ValueError, match=message) as refused:
        import_checkpoint(folder, tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]


def test_settings_of_both_versions_of_transformers_are_read(tmp_path, tokens):
    folder = saved(llama(), tmp_path / "theirs")
    new = model_config(json.loads((folder / "config.json").read_text()))
    edit(folder, rope_parameters=None, rope_theta=500.0, head_dim=None)
    old = model_config(json.loads((folder / "config.json").read_text()) | {"rope_scaling": None})
    assert old == new and old.rope_theta == 500.0
