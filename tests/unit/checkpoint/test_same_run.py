"""What a resume refuses, what may be overridden by name, and what is free."""

import dataclasses

import pytest

from megagpt.checkpoint.same_run import refuse_other_run
from megagpt.config.schema import Config, ModelConfig, OptimizerConfig

DATA = {"train": {"bytes": 5}}


@pytest.fixture
def saved(make_state):
    return make_state(config=Config(model=ModelConfig(vocab_size=13)), tokenizer_sha256="ab")


def changed(**sections):
    """The saved configuration with some values of its sections changed."""
    config = Config(model=ModelConfig(vocab_size=13))
    return dataclasses.replace(
        config,
        **{
            section: dataclasses.replace(getattr(config, section), **values)
            for section, values in sections.items()
        },
    )


def compare(saved, config=None, *, data=DATA, tokenizer="ab", override=()):
    return refuse_other_run(
        saved,
        config or changed(),
        data_fingerprint=data,
        tokenizer_sha256=tokenizer,
        override=override,
    )


def test_same_run_goes_on(saved):
    assert compare(saved) == []


def test_every_difference_is_told_at_once_with_both_values(saved):
    config = changed(
        model={"dropout": 0.1},
        optimizer={"lr": 0.5},
        batch={"global_batch_size": 64},
        training={"seed": 7, "precision": "fp32"},
        data={"eod_mask_loss": True},
    )
    with pytest.raises(ValueError) as caught:
        compare(saved, config, data={"train": {"bytes": 6}}, tokenizer="cd")
    for told in (
        *("model.dropout: saved 0.0, asked 0.1", "optimizer.lr: saved 0.001, asked 0.5"),
        *("batch.global_batch_size: saved 32, asked 64", "training.seed: saved 1234, asked 7"),
        *("training.precision: saved bf16, asked fp32", "data: the files", "tokenizer: it is"),
        "data.eod_mask_loss: saved False, asked True",
    ):
        assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    names = str(caught.value).partition("--checkpoint.override '[")[2].partition("]")[0].split(", ")
    assert len(names) == 8
    # What the line proposes does allow it, and tells each.
    assert len(compare(saved, config, data={}, tokenizer="cd", override=names)) == 8
    for name in names:
        others = [each for each in names if each != name]
        with pytest.raises(ValueError, match=rf"checkpoint: {name}: .*override '\[{name}\]'"):
            compare(saved, config, data={}, tokenizer="cd", override=others)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"num_layers": 7}, "num_layers"),
        ({"hidden_size": 768}, "hidden_size"),
        ({"num_attention_heads": 12}, "num_attention_heads"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"ffn_hidden_size": 5}, "ffn_hidden_size"),
        ({"vocab_size": 14}, "vocab_size"),
        ({"normalization": "rmsnorm"}, "normalization"),
        ({"position_embedding": "rope"}, "position_embedding"),
        ({"activation": "swiglu"}, "activation"),
        ({"bias": False}, "bias"),
        ({"qk_norm": True}, "qk_norm"),
        ({"tie_embeddings": False}, "tie_embeddings"),
        ({"seq_length": 128}, "seq_length"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shape_of_the_model_is_never_overridden(saved, model, name):
    with pytest.raises(ValueError, match=f"model.{name}: saved") as caught:
        compare(saved, changed(model=model), override=[f"model.{name}"])
    assert "--checkpoint.override" not in str(caught.value)


def test_length_of_the_run_may_not_move_the_schedule_unsaid(saved, make_state):
    config = changed(training={"train_steps": 5000})
    with pytest.raises(ValueError, match=r"decay_steps: saved 500, asked 5000; .*decay_steps\]'"):
        compare(saved, config)
    assert compare(saved, config, override=["optimizer.decay_steps"])
    wsd = {"schedule": "wsd"}
    saved = make_state(config=changed(optimizer=wsd))
    with pytest.raises(ValueError, match="wsd_decay_steps: saved 50, asked 500;"):
        compare(saved, changed(training={"train_steps": 5000}, optimizer=wsd))
    constant = {"schedule": "constant"}
    saved = make_state(config=changed(optimizer=constant))
    assert not compare(saved, changed(training={"train_steps": 5000}, optimizer=constant))


def test_length_of_the_context_may_be_overridden_without_a_table_of_positions(make_state):
    rope = {"position_embedding": "rope"}
    saved = make_state(config=changed(model=rope))
    config = changed(model={**rope, "seq_length": 512})
    with pytest.raises(ValueError, match=r"override '\[model.seq_length\]'"):
        compare(saved, config)
    assert compare(saved, config, override=["model.seq_length"]) == [
        "model.seq_length: saved 256, asked 512"
    ]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optimizer.lt", "did you mean 'optimizer.lr'?"),
        ("tokeniser", "did you mean 'tokenizer'?"),
        ("training.train_steps", "did you mean"),
        ("xyz", "see docs/checkpoints.md"),
    ],
)
def test_override_that_names_nothing_is_refused_even_where_nothing_differs(saved, override, hint):
    with pytest.raises(ValueError, match=f"override={override} names nothing") as caught:
        compare(saved, override=[override])
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        changed(
            training={"train_steps": 5000, "eval_interval": 7, "exit_step": 9},
            optimizer={"decay_steps": 500},
        ),
        changed(training={"activation_checkpointing": "full"}),
        changed(parallel={"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        changed(batch={"micro_batch_size": 1}),
        changed(model={"vocab_padding_multiple": 64}),
        changed(data={"path": "elsewhere/a", "index_cache": "b"}),
        changed(checkpoint={"save_interval": 3}, monitor={"log_interval": 5}),
    ],
    ids=["length", "recompute", "layout", "micro-batch", "padding", "paths", "saving and logging"],
)
def test_longer_run_and_other_layout_go_on(saved, config):
    assert compare(saved, config) == []


def test_tokenizer_that_one_does_not_know_is_no_difference(saved, make_state):
    assert compare(saved, tokenizer=None) == []
    assert compare(make_state(), tokenizer="cd") == []


def test_every_setting_of_model_and_optimizer_is_compared(saved):
    """A new setting that is left out would change a resumed run in silence."""
    for section, owner in (("model", ModelConfig), ("optimizer", OptimizerConfig)):
        for field in dataclasses.fields(owner):
            if field.name != "vocab_padding_multiple":
                compare(saved, override=[f"{section}.{field.name}"])
