"""One fine-tuning model under one stack, as a user of that stack builds it: what the scripts for whole runs share.

Stacks: `hf`; `hf-compile` (each layer and the loss under torch.compile); `liger`; `diy` (compiled layers and Liger's
fused linear cross entropy); `unsloth`; `fxopt`. Some patch classes of transformers when they are imported: run each in
a process of its own, and call `import_first` before anything imports transformers.
"""

from __future__ import annotations

import dataclasses
import platform
import resource
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
STACKS = ("hf", "hf-compile", "liger", "diy", "unsloth", "fxopt")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
MOST_CAPTURES = 64
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "liger-kernel", "unsloth")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is built: weights in `folder`, in four bits or bf16, adapters of rank 16 on all projections."""

    folder: str
    stack: str
    four_bits: bool = True
    checkpointed: bool = False
    length: int = 4096
    seed: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of `fxopt.optimize`."""

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cuda" if torch.cuda.is_available() else "cpu"


def import_first(stack: str) -> None:
    """Import what has to come before transformers."""
    if stack == "unsloth":
        import unsloth  # noqa: F401  # pyright: ignore


def build(setup: Setup) -> nn.Module:
    """Return the model of `setup`, in training mode."""
    torch.manual_seed(setup.seed)
    model = _build_unsloth(setup) if setup.stack == "unsloth" else _build_stock(setup)
    model.config.use_cache = False
    return model.train()


def _build_unsloth(setup: Setup) -> Any:
    from unsloth import FastLanguageModel  # pyright: ignore

    model, _ = FastLanguageModel.from_pretrained(
        model_name=setup.folder,
        max_seq_length=setup.length,
        load_in_4bit=setup.four_bits,
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        target_modules=PROJECTIONS,
        lora_alpha=RANK,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if setup.checkpointed else False,
        random_state=setup.seed,
    )


def _build_stock(setup: Setup) -> Any:
    from peft import LoraConfig, get_peft_model

    if setup.stack in ("liger", "diy"):
        _apply_liger(setup)
    model: Any = load(setup.folder, setup.four_bits, torch.bfloat16, setup.device)
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0,
        bias="none",
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    if setup.checkpointed and setup.stack != "fxopt":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if setup.stack in ("hf-compile", "diy"):
        torch._dynamo.config.recompile_limit = MOST_CAPTURES
        inner = model.get_base_model()
        for layer in inner.model.layers:
            layer.compile()
        if setup.stack == "hf-compile":
            untyped: Any = torch
            inner._loss_function = untyped.compile(inner.loss_function)
    if setup.stack == "fxopt":
        import fxopt

        budget: dict[str, Any] = {"memory_budget": "min"} if setup.checkpointed else {}
        model = fxopt.optimize(model, **(budget | setup.options))
    return model


def load(folder: str, four_bits: bool, dtype: torch.dtype, device: str) -> Any:
    """Return the base model, computing in `dtype`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if four_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    placed = {"": 0} if device == "cuda" else device
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=placed, attn_implementation="sdpa", **options
    )


def _apply_liger(setup: Setup) -> None:
    """Put Liger's kernels into transformers' classes, for `diy` the loss head alone."""
    import liger_kernel.transformers as liger  # pyright: ignore
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(setup.folder)
    apply = getattr(liger, f"apply_liger_kernel_to_{config.model_type}")
    if setup.stack == "liger":
        apply()
        return
    gated = "geglu" if "gemma" in config.model_type else "swiglu"
    apply(rope=False, rms_norm=False, cross_entropy=False, fused_linear_cross_entropy=True, **{gated: False})


def num_graphs() -> int:
    """Return how many graphs Dynamo has captured in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def peak_gib() -> float:
    """Return the most GiB that were allocated on the GPU, or that the process held."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def describe_machine() -> dict[str, Any]:
    """Return what figures depend on."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "python": platform.python_version(),
        "versions": versions,
    }


def find_commit() -> str:
    """Return the commit that is checked out, "unknown" where there is no repository or no git."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def find_folder(model: str | None, size: str) -> str:
    """Return the folder `model`, or one with random weights of a shape of Qwen2.5's, made once."""
    if model is not None:
        return model
    from examples import materials

    return str(materials.make_model(ROOT / "build" / "benchmarks" / size, size))


def read_tokens(vocabulary: int) -> list[list[list[int]]]:
    """Return Python's manual as topics of paragraphs of token ids below `vocabulary`."""
    from pydoc_data import topics

    from examples import materials

    tokenizer = materials.make_tokenizer(min(vocabulary, 8192))
    return [
        [tokenizer.encode(part + "\n\n") for part in text.split("\n\n")]
        for _, text in sorted(topics.topics.items())
    ]
