"""What is measured: model types by task, and a training batch for each task, made from the model alone."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

BATCH, TOKENS, IMAGE_TEXT_TOKENS = 2, 16, 24
"""Some models unroll a loop over tokens: twice as many take twice as long to capture."""
IMAGE_TOKENS = slice(2, 18)
"""Where in a row of tokens those of the image stand; the rest is text."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One model type under one task; `str` is how the command line and the rows name it."""

    model_type: str
    task: str = "causal-lm"

    def __str__(self) -> str:
        """Return the type alone for causal language models, else "type:task"."""
        return self.model_type if self.task == "causal-lm" else f"{self.model_type}:{self.task}"


AUTO_CLASSES: dict[str, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "ctc": "AutoModelForCTC",
    "image": "AutoModelForImageClassification",
    "vision": "AutoModel",
    "contrastive": "AutoModel",
    "image-text": "AutoModelForImageTextToText",
}

OTHERS: dict[str, tuple[str, ...]] = {
    "masked-lm": (
        *("bert", "roberta", "distilbert", "albert", "electra", "deberta-v2", "mpnet", "modernbert"),
        *("xlm-roberta", "camembert", "eurobert", "nomic_bert", "convbert", "nystromformer", "esm"),
    ),
    "seq2seq": (
        *("t5", "mt5", "umt5", "longt5", "switch_transformers", "bart", "mbart", "pegasus", "marian"),
        *("m2m_100", "t5gemma", "t5gemma2"),
    ),
    "speech-seq2seq": ("whisper", "moonshine", "speech_to_text"),
    "ctc": ("wav2vec2", "hubert", "wavlm", "wav2vec2-conformer", "unispeech"),
    "image": ("vit", "beit", "dinov2", "siglip", "swin", "convnext", "ijepa"),
    "vision": ("dinov3_vit", "deit", "dinov2_with_registers", "pixtral"),
    "contrastive": ("clip", "siglip", "clipseg", "chinese_clip", "altclip", "metaclip_2"),
    "image-text": (
        *("llava", "paligemma", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        *("idefics3", "smolvlm", "internvl", "mistral3", "mllama", "aya_vision", "glm4v", "cohere2_vision"),
    ),
}
"""Types outside causal language models whose blocks train, by task."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a family takes images: tokens per image, patches in one flat row or dimensions, what else it is given."""

    types: tuple[str, ...] = ()
    tokens: int = 16
    patches: int = 0
    ndim: int = 4
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


LAYOUTS = (
    Layout(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"),
        patches=128,
        extra={"image_grid_thw": [[1, 8, 8]] * BATCH},
    ),
    Layout(("aya_vision", "cohere2_vision", "internvl"), tokens=4),
    Layout(("idefics3", "smolvlm"), tokens=4, ndim=5),
    Layout(("mistral3",), tokens=4, extra={"image_sizes": [[32, 32]] * BATCH}),
    Layout(
        ("mllama",),
        tokens=0,
        ndim=6,
        extra={"aspect_ratio_ids": [[1]] * BATCH, "aspect_ratio_mask": [[[1, 0, 0, 0]]] * BATCH},
    ),
)


def all_cases() -> tuple[Case, ...]:
    """Return every causal-LM type of the installed transformers, and of `OTHERS` what it has."""
    causal = tuple(Case(name) for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    others = tuple(
        Case(name, task) for task, names in OTHERS.items() for name in names if name in CONFIG_MAPPING
    )
    return (*causal, *others)


def find_cases(names: tuple[str, ...]) -> tuple[Case, ...]:
    """Return the cases of `names`, each a type or "type:task"; one of another task than its own cannot be built."""
    cases: list[Case] = []
    for name in names:
        found = [case for case in all_cases() if name in (str(case), case.model_type)]
        model_type, _, task = name.partition(":")
        cases += found or [Case(model_type, task or "causal-lm")]
    return tuple(dict.fromkeys(cases))


def make_batch(model: torch.nn.Module, config: PreTrainedConfig, task: str) -> dict[str, Any]:
    """Return keyword arguments of one training call of `model`."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", None) or 100)

    def tokens(length: int = TOKENS) -> torch.Tensor:
        return torch.randint(3, min(vocabulary, 200), (BATCH, length), generator=generator)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    if task in ("causal-lm", "masked-lm", "seq2seq"):
        ids = tokens()
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": tokens()}
        if task == "causal-lm":
            batch["labels"] = ids.clone()
        return _taken(model, batch)
    if task == "speech-seq2seq":
        features = (
            {"input_values": normal(BATCH, 2000)}
            if config.model_type == "moonshine"
            else {"input_features": normal(BATCH, *_mel_sizes(config))}
        )
        return {**features, "labels": tokens()}
    if task == "ctc":
        return {"input_values": normal(BATCH, 2000), "labels": tokens(3)}
    pixels = normal(BATCH, *_image_sizes(config))
    if task == "image":
        return {"pixel_values": pixels, "labels": torch.arange(BATCH) % 2}
    if task == "vision":
        return {"pixel_values": pixels}
    if task == "contrastive":
        return {"input_ids": tokens(), "pixel_values": pixels, "return_loss": True}
    return _image_text_batch(config, tokens(IMAGE_TEXT_TOKENS), pixels)


def _taken(model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return batch
    return {name: value for name, value in batch.items() if name in parameters}


def _mel_sizes(config: Any) -> tuple[int, int]:
    """Return the sizes of one clip's features: bins first for models that convolve over time."""
    if hasattr(config, "num_mel_bins"):
        return (config.num_mel_bins, 2 * config.max_source_positions)
    return (2 * config.max_source_positions, config.input_feat_per_channel)


def _image_sizes(config: Any) -> tuple[int, int, int]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return (getattr(vision, "num_channels", 3), height, width)


def _image_text_batch(config: Any, ids: torch.Tensor, pixels: torch.Tensor) -> dict[str, Any]:
    """Return text with one image per row, in the layout of the type."""
    family = next((each for each in LAYOUTS if config.model_type in each.types), Layout())
    names = ("image_token_id", "image_token_index")
    token = next(getattr(config, name) for name in names if getattr(config, name, None) is not None)
    labels = ids.clone()
    where = slice(IMAGE_TOKENS.start, IMAGE_TOKENS.start + family.tokens)
    if family.tokens:
        ids[:, where] = token
        labels[:, where] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    extra = {name: torch.tensor(value) for name, value in family.extra.items()}
    if family.patches:
        vision = config.vision_config
        width = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        pixels = pixels.flatten().repeat(family.patches)[: family.patches * width].reshape(-1, width)
        extra["mm_token_type_ids"] = (ids == token).long()
    if family.ndim == 6:
        pixels = pixels[:, None, None].expand(-1, 1, config.vision_config.max_num_tiles, -1, -1, -1)
    return {**batch, **extra, "pixel_values": pixels[:, None] if family.ndim == 5 else pixels}
