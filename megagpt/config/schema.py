"""The typed configuration: one frozen dataclass a section, checked when it is built.

Knows nothing of torch or DeepSpeed. The command line that fills it is `command_line.py`; the
DeepSpeed JSON that goes with it is `deepspeed_config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megagpt.config.ranges import require_blend, require_not_negative, require_positive

Precision = Literal["fp32", "bf16", "fp16"]
Recompute = Literal["none", "full", "selective"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape and manner of a decoder-only GPT; spans GPT-2 and Llama."""

    num_layers: int = 6
    """Transformer blocks."""
    hidden_size: int = 384
    """Width of the residual stream."""
    num_attention_heads: int = 6
    """Query heads; must divide hidden_size."""
    num_kv_heads: int | None = None
    """Key/value heads for grouped-query attention; default num_attention_heads."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP; default 4 * hidden_size, under swiglu 8/3 to a multiple of 64."""
    seq_length: int = 256
    """Tokens of one training sample, and the largest context."""
    vocab_size: int | None = None
    """Tokens of the vocabulary; default: the tokenizer's, read from the data's manifest."""
    vocab_padding_multiple: int = 128
    """The vocabulary is padded to this times tensor_parallel_size; the loss masks the padding."""
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of norm."""
    norm_eps: float = 1e-5
    """Epsilon inside the norm."""
    position_embedding: Literal["learned", "rope"] = "learned"
    """Learned absolute positions (GPT-2) or rotary ones (Llama)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """MLP non-linearity; gelu is the tanh form of GPT-2."""
    bias: bool = True
    """Biases in linear layers (GPT-2: true, Llama: false)."""
    qk_norm: bool = False
    """Normalise queries and keys per head."""
    tie_embeddings: bool = True
    """Share the embedding with the output layer."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's denominator in the training loss; keeps
    logits small (PaLM: 1e-4). Validation leaves it out."""
    init_std: float = 0.02
    """Standard deviation of initial weights; over sqrt(2 * num_layers) for residual outputs."""

    dropout: float = 0.0
    """Probability of dropping an element after the embedding and each residual branch."""

    def __post_init__(self) -> None:
        """Checks the shape; a bad one is a ValueError."""
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1); choose for example 0.1")
        require_not_negative(self, "z_loss")
        require_positive(
            self,
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_kv_heads",
            "ffn_hidden_size",
            "seq_length",
            "vocab_size",
            "vocab_padding_multiple",
            "norm_eps",
            "init_std",
        )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by "
                f"num_attention_heads={self.num_attention_heads}; choose heads that divide it"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_kv_heads={self.kv_heads}; choose num_kv_heads that divides it"
            )
        if self.position_embedding == "rope" and self.head_size % 2:
            raise ValueError(
                f"hidden_size / num_attention_heads = {self.head_size} is odd; rotary positions "
                "turn pairs, so choose an even head size"
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, after the default."""
        return self.num_kv_heads or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP, after the default."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.activation == "swiglu":
            return (8 * self.hidden_size // 3 + 63) // 64 * 64
        return 4 * self.hidden_size

    def padded_vocab_size(self, tensor_parallel_size: int = 1) -> int:
        """Rows of the embedding: vocab_size, padded to a multiple for tensor_parallel_size."""
        assert self.vocab_size is not None, (
            "vocab_size is filled in from the data before the model is built"
        )
        multiple = self.vocab_padding_multiple * tensor_parallel_size
        return (self.vocab_size + multiple - 1) // multiple * multiple


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the parallel axes; data parallelism takes what is left of the world."""

    tensor_parallel_size: int = 1
    """Ranks that split each layer."""
    pipeline_parallel_size: int = 1
    """Stages that split the layers among ranks; needs ZeRO 0 or 1."""
    sequence_parallel: bool = False
    """Split norms and the residual stream over the sequence, on the tensor-parallel ranks."""
    pipeline_partition: Literal["parameters", "flops"] = "parameters"
    """What the stages share evenly."""
    startup_timeout_minutes: float = 30.0
    """How long a rank waits for the others up to the end of the first step."""
    collective_timeout_minutes: float = 10.0
    """How long a rank waits for the others in a collective after that, before the run ends."""

    def __post_init__(self) -> None:
        """Checks the degrees, and that no setting is without effect."""
        require_positive(
            self,
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "startup_timeout_minutes",
            "collective_timeout_minutes",
        )
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ValueError(
                "sequence_parallel=true has no effect at tensor_parallel_size=1; "
                "raise tensor_parallel_size or leave it out"
            )
        if self.pipeline_partition != "parameters" and self.pipeline_parallel_size == 1:
            raise ValueError(
                f"pipeline_partition={self.pipeline_partition} has no effect at "
                "pipeline_parallel_size=1; raise pipeline_parallel_size or leave it out"
            )


@dataclass(frozen=True)
class BatchConfig:
    """Samples per step; global = micro * accumulation * data-parallel ranks."""

    micro_batch_size: int = 4
    """Samples per data-parallel rank per forward pass."""
    global_batch_size: int = 32
    """Samples per optimizer step over all ranks."""

    def __post_init__(self) -> None:
        """Checks the sizes."""
        require_positive(self, "micro_batch_size", "global_batch_size")

    def gradient_accumulation_steps(self, data_parallel_size: int) -> int | None:
        """Micro-batches per rank per step; None where they do not divide, which is refused."""
        steps, rest = divmod(self.global_batch_size, self.micro_batch_size * data_parallel_size)
        return None if rest else steps


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and clipping."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moments."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only; norms, biases and other vectors get none."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the decay after the warm-up; wsd is warmup-stable-decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 to lr."""
    decay_steps: int | None = None
    """Step at which min_lr is reached; default training.train_steps."""
    wsd_decay_steps: int | None = None
    """Steps of the final linear decay under wsd; default a tenth of decay_steps."""

    def __post_init__(self) -> None:
        """Checks ranges and that no setting is without effect."""
        require_positive(self, "lr", "eps", "decay_steps", "wsd_decay_steps")
        require_not_negative(self, "min_lr", "weight_decay", "clip_grad", "warmup_steps")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas={list(self.betas)} must lie in [0, 1); change {beta}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}; choose a smaller min_lr")
        if self.wsd_decay_steps is not None and self.schedule != "wsd":
            raise ValueError(
                f"wsd_decay_steps={self.wsd_decay_steps} has no effect under "
                f"schedule={self.schedule}; choose schedule=wsd or leave it out"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how precisely to train, and when to evaluate."""

    train_steps: int = 500
    """Optimizer steps of the whole run, also the default end of the decay."""
    train_tokens: int | None = None
    """Stop after the step that reaches this many tokens."""
    exit_duration_seconds: float | None = None
    """Save and stop after the first step that ends later than this after the start."""
    exit_step: int | None = None
    """Save and stop after this step, before train_steps; the schedule is that of the whole run."""
    precision: Precision = "bf16"
    """Type of weights and activations; master weights, gradients and moments are fp32."""
    kernels: Literal["auto", "reference", "triton", "cpu"] = "auto"
    """Back end of the fused operations: the fastest that runs here, plain torch, Triton's on a GPU,
    or compiled C++ on a CPU; the log tells what each layer got."""
    activation_checkpointing: Recompute = "none"
    """What the backward pass recomputes: nothing, whole blocks (full), or what is large and cheap,
    the MLP's activation (selective)."""
    seed: int = 1234
    """Seed of the initial weights and of the order of the data."""
    max_nonfinite_steps: int = 10
    """End the run with exit code 3 after so many steps in a row whose loss or gradient norm is not
    finite, under fp16 at the least loss scale; 0 never does."""
    eval_interval: int = 100
    """Steps between validations; 0 validates only at the end."""
    eval_samples: int | None = None
    """Validation samples per evaluation; default a tenth of those trained between two of them (for
    eval_interval=0 100 global batches), and all where there are fewer."""

    def __post_init__(self) -> None:
        """Checks ranges."""
        require_positive(
            self,
            "train_steps",
            "train_tokens",
            "exit_duration_seconds",
            "exit_step",
            "eval_samples",
        )
        require_not_negative(self, "seed", "eval_interval", "max_nonfinite_steps")

    def samples_of_evaluation(self, global_batch_size: int) -> int:
        """Validation samples per evaluation, after the default; there may be fewer."""
        if self.eval_samples is not None:
            return self.eval_samples
        return max(1, (self.eval_interval or 1000) * global_batch_size // 10)


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens are: pairs split by documents, or pairs for each split."""

    path: dict[str, float] | list[str] | str | None = None
    """Prefix of a .bin/.idx pair, divided into train, validation and test by `split`; several as
    {prefix: weight}, or as a list, weighted by size."""
    split: str = "969,30,1"
    """Shares of documents for train, validation and test; used with `path`."""
    train_path: dict[str, float] | list[str] | str | None = None
    """Prefix of the training pair, or several as in `path`; used instead of `path`."""
    valid_path: list[str] | str | None = None
    """Prefix of the validation pair, or several that count as one, with train_path."""
    test_path: list[str] | str | None = None
    """Prefix of the test pair, or several that count as one, with train_path."""
    valid_sets: dict[str, str] | None = None
    """Further validation pairs as {name: prefix}, each with a loss of its own."""
    order: Literal["epoch", "megatron"] = "epoch"
    """Order of training: by (seed, epoch), whatever the length of the run; or Megatron-LM's."""
    index_cache: str | None = None
    """Folder of sample indices, of the node or shared; default: `index_cache` beside the pair."""
    document_masking: bool = False
    """Keep attention and positions within documents; ends are the manifest's eod tokens."""
    eod_mask_loss: bool = False
    """Leave out the loss of what follows an end of document, which nothing before it tells."""
    tokenizer_path: str | None = None
    """SentencePiece model or tokenizer.json; default: the one named in the data's manifest."""

    def __post_init__(self) -> None:
        """Checks that exactly one way of naming the data is used."""
        if self.path and (self.train_path or self.valid_path or self.test_path):
            raise ValueError(
                f"data.path={self.path} and data.train_path/valid_path/test_path exclude each "
                "other; name pairs to split, or pairs for each split"
            )
        if (self.valid_path or self.test_path) and not self.train_path:
            raise ValueError(
                f"data.valid_path={self.valid_path}, data.test_path={self.test_path} need "
                "data.train_path; name the training pair too"
            )
        for name in ("path", "train_path", "valid_path", "test_path"):
            paths = getattr(self, name)
            if isinstance(paths, (dict, list)):
                require_blend(name, paths)


@dataclass(frozen=True)
class CheckpointConfig:
    """Where state is saved, how often, and what to resume from."""

    save_interval: int = 100
    """Steps between saves; 0 saves only at the end."""
    async_save: bool = False
    """Go on training while a copy in host memory is written; not with the optimizer on NVMe."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """Whether a save that fails ends the run, or it goes on to the next one; the last one ends it
    always."""
    keep_last: int = 0
    """How many of the newest checkpoints stay; 0 keeps all."""
    keep_every: int = 0
    """Steps whose multiples stay as well, with keep_last; 0 is none."""
    load: str = "none"
    """`none` starts afresh, `auto` resumes the newest checkpoint of the run folder, else a path."""
    timeout_minutes: float = 30.0
    """How long a rank waits for the files of the others."""
    override: list[str] | None = None
    """Settings that may differ from those of the checkpoint, as [optimizer.lr, data]."""

    def __post_init__(self) -> None:
        """Checks ranges and that no setting is without effect."""
        require_not_negative(self, "save_interval", "keep_last", "keep_every")
        require_positive(self, "timeout_minutes")
        if self.keep_every and not self.keep_last:
            raise ValueError(
                f"keep_every={self.keep_every} has no effect with keep_last=0, which keeps all; "
                "give keep_last too"
            )
        if self.override and self.load == "none":
            raise ValueError(
                f"override={self.override} has no effect with load=none; give --checkpoint.load too"
            )


@dataclass(frozen=True)
class MonitorConfig:
    """What is logged and where."""

    log_interval: int = 1
    """Steps between log lines and TensorBoard points."""
    params_norm_interval: int = 10
    """Steps between measurements of the norm of all weights, each of which is read; 0 is never."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one accelerator in the run's precision; with it, `mfu` (attention's causal
    half, as in Megatron-LM) and `mfu-full-attention` (whole squares, as in PaLM) are logged."""

    def __post_init__(self) -> None:
        """Checks ranges."""
        require_positive(self, "log_interval", "peak_tflops")
        require_not_negative(self, "params_norm_interval")


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run; what crosses sections is checked by `refusals.py`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    output_dir: str = "runs/default"
    """Run folder: checkpoints, TensorBoard, and the resolved configuration."""

    @property
    def decay_steps(self) -> int:
        """Step at which the schedule ends, after the default."""
        return self.optimizer.decay_steps or self.training.train_steps

    @property
    def wsd_decay_steps(self) -> int:
        """Steps of the final decay under wsd, after the default; 0 under other schedules."""
        if self.optimizer.schedule != "wsd":
            return 0
        return self.optimizer.wsd_decay_steps or max(1, self.decay_steps // 10)
