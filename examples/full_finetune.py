"""All weights trained, with transformers and TRL; fxopt is one line of it.

    python examples/full_finetune.py --tiny        # seconds on a CPU
    python examples/full_finetune.py --size 0.5b   # on a GPU
    python examples/full_finetune.py --model ./my-model

The same command again goes on from the last checkpoint.
"""

from __future__ import annotations

import materials
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import fxopt


def main(argv: list[str] | None = None) -> None:
    """Train all weights in fp32 under bf16 autocast, write them, and let the model answer."""
    args = materials.read_arguments(__doc__ or "", argv)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
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
            learning_rate=5e-5,
            logging_steps=1,
            save_steps=max(args.steps // 3, 1),
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=args.on_cpu,
            report_to=[],
        ),
    )
    trainer.train(resume_from_checkpoint=materials.find_checkpoint(args.output))
    trainer.save_model(str(args.output / "trained"))
    print(materials.answer(model, args.model, "What does the Python manual say about assert?"))


if __name__ == "__main__":
    main()
