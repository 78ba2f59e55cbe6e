"""A checkpoint and its tokenizer as a folder of Hugging Face's transformers.

Next file: `megagpt/checkpoint/huggingface/convert.py`, which writes the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megagpt.checkpoint.directory import newest_state
from megagpt.checkpoint.huggingface.convert import WeightType, export_checkpoint
from megagpt.data.tokenizers.protocol import Tokenizer
from megagpt.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megagpt.files import encode_json
from megagpt.inference.load import open_tokenizer

# Of sentencepiece_model.proto: ModelType; and Type, of normal, unknown, control and byte pieces.
_BPE = 2
_PIECE_TYPES = (1, 2, 3, 6)


def export(
    checkpoint: Path,
    output: Path,
    *,
    dtype: WeightType = "fp32",
    max_shard_gib: float = 5.0,
    tokenizer_path: str | None = None,
    eod: str | None = None,
) -> str:
    """Writes the folder, with the tokenizer where transformers has its like.

    Args:
        checkpoint: Run folder (its newest step) or step folder.
        output: The folder; appears when it is whole.
        dtype: Of the weights.
        max_shard_gib: Size of one file of weights.
        tokenizer_path: Where the tokenizer is now, or `none`; default: the one of the run's data.
        eod: Name of the token that ends documents, where the data does not tell.

    Returns:
        What became of the tokenizer, for the user.

    Raises:
        ValueError: If the checkpoint, its model or its tokenizer cannot be exported.
    """
    if not 0 < max_shard_gib < float("inf"):
        raise ValueError(f"max_shard_gib={max_shard_gib} must be above 0; give for example 5")
    files: dict[str, bytes] = {}
    eos, note = None, "without a tokenizer"
    if tokenizer_path != "none":
        config = newest_state(checkpoint).config
        tokenizer = open_tokenizer(config, tokenizer_path, eod=eod)
        eos = tokenizer.eod
        files, note = tokenizer_files(tokenizer, model_max_length=config.model.seq_length)
    export_checkpoint(
        checkpoint,
        output,
        dtype=dtype,
        max_shard_bytes=max(1, int(max_shard_gib * (1 << 30))),
        eos_token_id=eos,
        files=files,
    )
    return note


def tokenizer_files(tokenizer: Tokenizer, *, model_max_length: int) -> tuple[dict[str, bytes], str]:
    """The files by which transformers' `AutoTokenizer` opens a tokenizer, and a note for the user.

    Transformers reads special tokens in a text, such as `<eod>`, as tokens; here they are text.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        name, settings = "tokenizer.model", _sentencepiece_settings(tokenizer)
        if settings is None:
            return {}, (
                f"without tokenizer {tokenizer.path}, for transformers gives other ids; it gives "
                "the same for SentencePiece's BPE with byte fallback that leaves the text as it is"
            )
    elif tokenizer.kind == "huggingface":
        import tokenizers  # an extra, which has opened the file already

        eos = tokenizers.Tokenizer.from_file(tokenizer.path).id_to_token(tokenizer.eod)
        name = "tokenizer.json"
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    else:
        return {}, f"without a tokenizer, for transformers has none like `{tokenizer.path}`"
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": model_max_length}
    files = {
        name: Path(tokenizer.path).read_bytes(),
        "tokenizer_config.json": encode_json(settings),
    }
    return files, f"with tokenizer {tokenizer.path}"


def _sentencepiece_settings(tokenizer: SentencePieceTokenizer) -> dict[str, Any] | None:
    """The class of transformers that gives the same ids; None where there is none."""
    model = tokenizer.model_proto()
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    is_same = (
        trainer.model_type == _BPE
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and all(piece.type in _PIECE_TYPES for piece in model.pieces)
        and normalizer.escape_whitespaces
        and not normalizer.add_dummy_prefix  # transformers adds none before a space
        and not normalizer.precompiled_charsmap
        and not normalizer.remove_extra_whitespaces
    )
    if not is_same:
        return None
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_prefix_space": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": None,
        "eos_token": model.pieces[tokenizer.eod].piece,
        "unk_token": trainer.unk_piece,
    }
