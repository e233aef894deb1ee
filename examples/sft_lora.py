"""LoRA on a bf16 base with transformers, PEFT and TRL, then the adapters merged; fxopt is one line of it.

    python examples/sft_lora.py --tiny             # seconds on a CPU
    python examples/sft_lora.py --size 1.5b        # on a GPU
    python examples/sft_lora.py --model ./my-model

The same command again goes on from the last checkpoint.
"""

from __future__ import annotations

import materials
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import fxopt


def main(argv: list[str] | None = None) -> None:
    """Train adapters, write them, write the model that they are merged into, and let it answer."""
    args = materials.read_arguments(__doc__ or "", argv)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model = fxopt.optimize(model)

    trainer = SFTTrainer(
        model=model,
        train_dataset=materials.make_chats(),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        args=SFTConfig(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulate,
            max_length=args.length,
            packing=True,
            learning_rate=2e-4,
            logging_steps=1,
            save_steps=max(args.steps // 3, 1),
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=args.on_cpu,
            report_to=[],
        ),
    )
    trainer.train(resume_from_checkpoint=materials.find_checkpoint(args.output))
    model.save_pretrained(args.output / "adapter")
    merged = fxopt.restore(model).merge_and_unload()
    merged.save_pretrained(args.output / "merged")
    print(materials.answer(merged, args.model, "What does the Python manual say about assert?"))


if __name__ == "__main__":
    main()
