"""Which run may go on from a checkpoint: what must be the same, and what may be overridden by name.

Layout, hosts, micro-batch and length of the run may always change. Of a checkpoint that was
imported from another program only the model counts, for that program had another batch, another
optimizer and other data; from its first step on, the run is one like any other. Knows no torch.
Next file: `saver.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megagpt.checkpoint.format.manifest import CheckpointState
from megagpt.config.command_line import config_to_dict
from megagpt.config.dotted_keys import did_you_mean, leaves
from megagpt.config.schema import Config

_COMPARED = (
    "batch.global_batch_size",
    "data.document_masking",
    "data.eod_mask_loss",
    "data.order",
    "training.precision",
    "training.seed",
)
"""Settings that decide how a run goes on, beside all of the sections model and optimizer."""

_FREE = ("model.vocab_padding_multiple",)
"""Settings of those sections that belong to the layout."""

_FIXED = (
    "model.activation",
    "model.bias",
    "model.ffn_hidden_size",
    "model.hidden_size",
    "model.normalization",
    "model.num_attention_heads",
    "model.num_kv_heads",
    "model.num_layers",
    "model.position_embedding",
    "model.qk_norm",
    "model.tie_embeddings",
    "model.vocab_size",
)
"""What the tensors of the checkpoint are; no override can change it."""

_COMPUTED = ("model.norm_eps", "model.rope_theta")
"""What else decides what a model computes from its tensors; the rest is about training it."""


def refuse_other_run(
    state: CheckpointState,
    config: Config,
    *,
    data_fingerprint: dict[str, Any],
    tokenizer_sha256: str | None,
    override: Iterable[str] = (),
) -> list[str]:
    """Refuses to resume where model, tokenizer, data, batch or optimizer differ, all in one line.

    The state is the checkpoint's, all else this run's; `override` names what may differ.

    Returns:
        What differs and was overridden, for the log.

    Raises:
        ValueError: With each difference, the saved value and the one asked for; or for an override
            that names nothing that is compared.
    """
    override = tuple(override)
    saved, wanted = _values(state.config), _values(config)
    names = [*wanted, "data", "tokenizer"]
    for name in override:
        if name not in names:
            hint = did_you_mean(name, names) or "; see docs/checkpoints.md"
            raise ValueError(
                f"checkpoint.override={name} names nothing that a resume compares{hint}"
            )
    fixed = set(_FIXED)
    if wanted["model.position_embedding"] == "learned":
        fixed.add("model.seq_length")  # the table of positions
    is_import = state.imported_from is not None and state.step == 0
    differences = {
        name: f"{name}: saved {saved[name]}, asked {wanted[name]}"
        for name in wanted
        if saved[name] != wanted[name] and (not is_import or name in {*fixed, *_COMPUTED})
    }
    if state.data_fingerprint != data_fingerprint and not is_import:
        differences["data"] = "data: the files or their shares have changed"
    hashes = (state.tokenizer_sha256, tokenizer_sha256)
    if None not in hashes and hashes[0] != hashes[1]:
        differences["tokenizer"] = "tokenizer: it is another one"
    refused = [name for name in differences if name in fixed or name not in override]
    if refused:
        overridable = [name for name in refused if name not in fixed]
        remedy = f"allow it with --checkpoint.override '[{', '.join(overridable)}]', or " * bool(
            overridable
        )
        raise ValueError(
            "cannot resume, because this run differs from the checkpoint: "
            + "; ".join(differences[name] for name in refused)
            + f"; give the saved values, {remedy}start afresh with --checkpoint.load none and "
            "another --output_dir"
        )
    return list(differences.values())


def _values(config: Config) -> dict[str, Any]:
    """What is compared, by dotted name."""
    saved = leaves(config_to_dict(config))
    names = [*(name for name in saved if name.startswith(("model.", "optimizer."))), *_COMPARED]
    values = {name: saved[name] for name in names if name not in _FREE}
    # After their defaults, which depend on the length of the run.
    is_constant = config.optimizer.schedule == "constant"
    values["optimizer.decay_steps"] = None if is_constant else config.decay_steps
    values["optimizer.wsd_decay_steps"] = config.wsd_decay_steps
    return values
