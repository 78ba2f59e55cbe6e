"""The mutations: each breaks one invariant of the trainer, by one edit of one place.

`mark(value)` leaves a mark that the line was executed, and returns its argument; `measure.py`
defines it for the ranks. Every mutation leaves a program that trains to the end, with all ranks at
the same collectives: what must differ is a number. Next file: `mutate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One broken invariant."""

    name: str
    invariant: str
    """What holds in the unbroken code."""
    file: str
    """Under megagpt/."""
    old: str
    """Text that the file holds exactly once."""
    new: str
    """What takes its place."""
    cells: tuple[str, ...]
    """Names of the parity cells, each of which must catch it."""


TENSOR = "tp2-zero0 gpt2 fp32"
SEQUENCE = "tp2-sp-zero0 gpt2 fp32"
PIPELINE = "pp2-zero0 gpt2 fp32"

TENSOR_PARALLELISM = (
    Mutation(
        "no reduction of row-parallel outputs",
        "The partial outputs of row-parallel layers are summed over tp.",
        "parallel/collectives.py",
        "return _apply(tensor, group, _all_reduce,",
        "return _apply(tensor, group, lambda partial, _: mark(partial.clone()),",
        (TENSOR,),
    ),
    Mutation(
        "no reduction of the input's gradient",
        "The gradient that enters a column-parallel region is summed over tp.",
        "parallel/collectives.py",
        "lambda whole, _: whole.view_as(whole), _all_reduce)",
        "lambda whole, _: whole.view_as(whole), lambda grad, _: mark(grad))",
        (TENSOR,),
    ),
    Mutation(
        "row-parallel bias before the reduction",
        "A row-parallel bias counts once, not once on every tp rank.",
        "model/layers.py",
        "y = F.linear(x, self.weight)  # [b, s, out], a partial sum",
        "return self.tp.leave(mark(F.linear(x, self.weight, self.bias)))",
        (TENSOR,),
    ),
    Mutation(
        "padding of the vocabulary shifted by one",
        "Only real tokens take part in the softmax, none of the rows that pad the vocabulary.",
        "kernels/linear_cross_entropy/contract.py",
        "return min(max(self.size - self.first, 0), rows)",
        "return mark(min(max(self.size + 1 - self.first, 0), rows))",
        (TENSOR,),
    ),
    Mutation(
        "softmax over a part of the vocabulary",
        "The softmax is normalised over the whole vocabulary, not over one rank's shard.",
        "kernels/linear_cross_entropy/chunked.py",
        "dist.all_gather_into_tensor(parts, statistics, group=group)",
        "parts.zero_()[3 * dist.get_rank(group) :][:3] = mark(statistics)",
        (TENSOR,),
    ),
    Mutation(
        "initial values of another rank",
        "A rank's initial weights are its slice of the whole weight's, for every degree.",
        "model/initialization.py",
        "tp_rank=group_rank(tp_group)",
        "tp_rank=mark(0)",
        (TENSOR,),
    ),
    Mutation(
        "per-head norms not summed",
        "The gradient of the per-head norms, which see a rank's heads only, is summed over tp.",
        "model/attention.py",
        "per_head = partial(Norm, config, config.head_size, split_group=tp.group)",
        "per_head = partial(Norm, config, config.head_size, split_group=mark(None))",
        ("tp2-zero1 llama fp32",),
    ),
    Mutation(
        "shared key/value heads not summed",
        "The gradient of a key/value head that ranks share is summed over them.",
        "model/layers.py",
        "weight = copy_to_group(self.weight, self.tp.group)[self.rows]",
        "weight = mark(self.weight)[self.rows]",
        ("tp4-zero0 llama fp32",),
    ),
)

SEQUENCE_PARALLELISM = (
    Mutation(
        "gathered sequence's gradient not summed",
        "The gradient of a gathered sequence is summed over tp before each rank takes its part.",
        "parallel/collectives.py",
        "return _apply(tensor, group, _all_gather, _reduce_scatter)",
        "size, rank = group_size(group), 0 if group is None else dist.get_rank(group)\n"
        "    return _apply(\n"
        "        tensor,\n"
        "        group,\n"
        "        _all_gather,\n"
        "        lambda grad, _: mark(grad.chunk(size, dim=1)[rank].contiguous()),\n"
        "    )",
        (SEQUENCE,),
    ),
    Mutation(
        "block norms not summed",
        "The gradient of the residual stream's norms, which see a part of the tokens, is summed.",
        "model/gpt.py",
        "attention_norm = Norm(config, h, split_group=tp.stream_group, kernels=kernels)",
        "attention_norm = Norm(config, h, split_group=mark(None), kernels=kernels)",
        (SEQUENCE,),
    ),
    Mutation(
        "row-parallel bias not summed",
        "The gradient of a row-parallel bias, added to a part of the tokens, is summed over tp.",
        "model/layers.py",
        "copy_to_group(self.bias, self.tp.stream_group)",
        "mark(self.bias)",
        (SEQUENCE,),
    ),
    Mutation(
        "position embedding not summed",
        "The gradient of the learned positions, of which a rank uses a part, is summed over tp.",
        "model/gpt.py",
        "copy_to_group(self.weight, group)",
        "mark(self.weight)",
        (SEQUENCE,),
    ),
    Mutation(
        "first positions on every rank",
        "A rank embeds the positions of its own part of the sequence.",
        "model/gpt.py",
        "own = position_ids.chunk(group_size(group), dim=-1)[group_rank(group)]",
        "own = position_ids.chunk(group_size(group), dim=-1)[mark(0)]",
        (SEQUENCE,),
    ),
    Mutation(
        "dropout as if the part were the whole",
        "A dropout mask depends on the place in the whole sequence, not in a rank's part.",
        "model/attention.py",
        "sequence_start=group_rank(self.stream_group) * x.shape[1],",
        "sequence_start=mark(0),",
        ("tp2-sp-zero1-full gpt2 fp32 dropout",),
    ),
)

NORM_AND_CLIPPING = (
    Mutation(
        "replicated weights counted on every rank",
        "Our gradient norm counts a weight that all tp ranks hold once.",
        "training/engine.py",
        'return groups.tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False)',
        "return mark(True)",
        (TENSOR,),
    ),
    Mutation(
        "split weights not marked",
        "DeepSpeed's gradient norm counts the split weights of every tp rank.",
        "model/layers.py",
        "parameter.tensor_model_parallel = True",
        "parameter.tensor_model_parallel = mark(False)",
        ("tp2-zero1 llama fp32", "tp2-zero3 gpt2 fp32"),
    ),
    Mutation(
        "tied weight counted twice",
        "The gradient norm counts a weight that the first and the last stage hold once.",
        # The mark itself, which DeepSpeed's norm reads too, cannot be lost unseen: no checkpoint is
        # written then, for the two stages would both write the weight.
        "training/engine.py",
        'if getattr(parameter, "ds_pipe_replicated", False):',
        "if mark(False):",
        (PIPELINE,),
    ),
    Mutation(
        "norm of one stage",
        "The gradient norm is of the whole model, not of the rank's stage or shard.",
        "training/engine.py",
        "dist.all_reduce(squares, group=groups.replica_group)",
        "mark(squares)",
        (PIPELINE,),
    ),
)

BATCH_AND_LOSS = (
    Mutation(
        "mean of each micro-batch",
        "Every token of the global batch weighs the same, in whichever micro-batch it stands.",
        "training/train_step.py",
        "engine.backward(loss * scale)",
        "engine.backward(loss * mark(1.0 / batch.num_tokens))",
        ("dp2-zero3 gpt2 fp32",),
    ),
    Mutation(
        "loss scale without data parallelism",
        "The loss's scale undoes the average that DeepSpeed takes over dp.",
        "training/train_step.py",
        "scale = len(batches) * groups.topology.data_parallel_size / max(num_tokens, 1)",
        "scale = mark(len(batches) / num_tokens)",
        ("dp2-zero0 llama fp32",),
    ),
    Mutation(
        "validation as a mean of means",
        "The validation loss is a ratio of sums over all ranks.",
        "training/train_step.py",
        "_sum_over_samples(loss_sum, num_tokens, groups=groups, device=engine.device)",
        "_sum_over_samples(\n"
        "        mark(loss_sum / max(num_tokens, 1)), 1, groups=groups, device=engine.device\n"
        "    )",
        ("dp2-zero3 gpt2 fp32",),
    ),
    Mutation(
        "learning rate one step late",
        "A step is taken at the learning rate of that step.",
        "training/loop.py",
        "        step,\n        config.optimizer,",
        "        mark(before.step),\n        config.optimizer,",
        ("zero0 gpt2 fp32",),
    ),
    Mutation(
        "dropout by place in the micro-batch",
        "A dropout mask belongs to the sample, not to its place in a rank's micro-batch.",
        "training/batches.py",
        "dropout_keys(torch.tensor(indices), ",
        "dropout_keys(mark(torch.arange(len(indices))), ",
        ("dp2-zero1 gpt2 fp32 dropout",),
    ),
    Mutation(
        "no document mask",
        "Attention stays within documents.",
        "model/gpt.py",
        "documents = Documents(position_ids, document_offsets)",
        "documents = mark(None)",
        ("tp2-zero0 llama fp32 documents",),
    ),
)

STAGES_AND_SHARDS = (
    Mutation(
        "tied gradient not summed",
        "The gradient of the tied weight is the sum of its uses on the first and the last stage.",
        "training/engine.py",
        "dist.all_reduce(gradient, group=group)",
        "mark(gradient)",
        (PIPELINE,),
    ),
    Mutation(
        "document positions left behind",
        "Document positions travel to every stage.",
        "model/pipeline.py",
        "position_ids = rest[0] if self.has_position_ids else None",
        "position_ids = rest[0] if self.stage.is_first else mark(None)",
        ("pp2-zero0 llama fp32 documents",),
    ),
    Mutation(
        "every shard is the first",
        "Under ZeRO-3 a rank's shard holds the values of its own place in the weight.",
        "model/zero3.py",
        "start = shard.ds_numel * torch.distributed.get_rank(parameter.ds_process_group)",
        "start = mark(0)",
        ("dp2-zero3 gpt2 fp32",),
    ),
    Mutation(
        "weight decay by the local shape",
        "Matrices decay under ZeRO-3 too, where a rank's own tensor is empty.",
        "training/optimizer.py",
        'shape = getattr(parameter, "ds_shape", parameter.shape)',
        "shape = mark(parameter.shape)",
        ("dp2-zero3 gpt2 fp32",),
    ),
)

MUTATIONS = (
    *TENSOR_PARALLELISM,
    *SEQUENCE_PARALLELISM,
    *NORM_AND_CLIPPING,
    *BATCH_AND_LOSS,
    *STAGES_AND_SHARDS,
)
