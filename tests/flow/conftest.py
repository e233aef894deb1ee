"""A tiny model on disk with its tokenizer, chats, and trainers run on it stock and optimized."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fxopt
from fxopt.report.records import MODEL_REGION

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "seed": 3,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Flow:
    """What the tests of a flow share; `folder` holds the stock model."""

    folder: Path
    tokenizer: Any
    chats: Any
    """Columns `prompt` and `completion`."""

    @property
    def messages(self) -> Any:
        """The chats in one column `messages`."""
        return self.chats.map(
            lambda row: {"messages": row["prompt"] + row["completion"]},
            remove_columns=["prompt", "completion"],
        )

    @property
    def tokens(self) -> Any:
        """The chats as `input_ids`, by the tokenizer's chat template."""

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            encoded = self.tokenizer.apply_chat_template(
                row["prompt"] + row["completion"], tokenize=True, return_dict=True
            )
            return {"input_ids": encoded["input_ids"][:48]}

        return self.chats.map(encode, remove_columns=["prompt", "completion"])

    def load(self) -> Any:
        """Return the stock model in fp32."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def make(self, *, optimized: bool, verify: str = "on", **lora: Any) -> Any:
        """Return the model with adapters, the same weights every time."""
        peft: Any = pytest.importorskip("peft")
        model = self.load()
        torch.manual_seed(1)
        options = {"r": 4, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **lora}
        model = peft.get_peft_model(model, peft.LoraConfig(**options))
        return fxopt.optimize(model, verify=verify) if optimized else model

    @property
    def projections(self) -> list[str]:
        """The linear layers of a block."""
        return PROJECTIONS

    @staticmethod
    def settings(output: Path, **settings: Any) -> dict[str, Any]:
        """Return arguments of a trainer for a short run on a CPU."""
        return {**SETTINGS, "output_dir": str(output), **settings}

    @staticmethod
    def figures(trainer: Any) -> list[dict[str, float]]:
        """Return what `trainer` logged of each step: the losses, the norm of all gradients, metrics."""
        kept = ("step", "loss", "grad_norm", "mean_token_accuracy", "eval_loss", "eval_accuracy")
        logged = [{name: row[name] for name in kept if name in row} for row in trainer.state.log_history]
        return [row for row in logged if len(row) > 1]


def assert_alike(
    ours: list[dict[str, float]], stock: list[dict[str, float]], tolerance: float = 1e-5
) -> None:
    """Check that two runs logged the same; they drift apart by what fp32 rounds, a little more at each step."""
    assert [row.keys() for row in ours] == [row.keys() for row in stock]
    assert stock
    for row, expected in zip(ours, stock, strict=True):
        assert row == pytest.approx(expected, rel=tolerance), (row, expected)


def assert_only_the_head_is_stock(model: Any) -> None:
    """Check that every block ran compiled, all its sites rewritten, and that the report names whose head it is."""
    report = fxopt.explain(model)
    blocks = [region for region in report.regions if region.kind == "block"]
    assert {region.status for region in blocks} == {"captured"}
    assert {fallback.region for fallback in report.fallbacks} == {MODEL_REGION}
    assert any("trl put a forward of its own" in note for note in report.notes)
    assert report.sites
    assert {site.status for site in report.sites} == {"rewritten"}


@pytest.fixture(scope="session")
def examples() -> Iterator[Any]:
    """Import what stands in `examples/`, as a script there would."""
    pytest.importorskip("trl")
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="session")
def flow(examples: Any, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """Make the model, its tokenizer and the chats once."""
    materials = examples("materials")
    folder = materials.make_model(tmp_path_factory.mktemp("flow") / "base", "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Flow(folder, tokenizer, materials.make_chats().select(range(40)))


@pytest.fixture
def checks() -> Any:
    """The checks above, for tests that cannot import a conftest."""

    class Checks:
        alike = staticmethod(assert_alike)
        only_the_head_is_stock = staticmethod(assert_only_the_head_is_stock)

    return Checks
