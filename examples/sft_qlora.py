"""QLoRA with transformers, PEFT, bitsandbytes and TRL; fxopt is one line of it.

    python examples/sft_qlora.py --tiny            # seconds on a CPU
    python examples/sft_qlora.py --size 7b         # on a GPU
    python examples/sft_qlora.py --model ./my-model

The same command again goes on from the last checkpoint.
"""

from __future__ import annotations

import materials
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import fxopt


def main(argv: list[str] | None = None) -> None:
    """Train adapters on a base in four bits, write them, and let the model answer."""
    args = materials.read_arguments(__doc__ or "", argv)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        quantization_config=four_bits,
        dtype=torch.bfloat16,
        device_map="cpu" if args.on_cpu else {"": 0},
    )
    config = LoraConfig(r=16, lora_alpha=32, target_modules=materials.ALL_PROJECTIONS, task_type="CAUSAL_LM")
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
    print(materials.answer(model, args.model, "What does the Python manual say about assert?"))
    print(fxopt.explain(model))


if __name__ == "__main__":
    main()
