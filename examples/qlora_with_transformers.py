"""QLoRA as the articles write it, with transformers, PEFT and TRL, on a CPU: one import is changed.

    python examples/qlora_with_transformers.py [MODEL [STEPS]]

MODEL is a folder in Hugging Face layout or a hub id; default: the embedded model. Needs the extra 'peers' (PEFT, TRL).
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

# from transformers import BitsAndBytesConfig
from lownibble.integrations.transformers import NF4Config as BitsAndBytesConfig
from lownibble.models import resolve

model_name = sys.argv[1] if len(sys.argv) > 1 else str(resolve("demo").folder)
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20

# 1. The base in 4 bits: NF4 with double quantisation.
bnb_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,  # bfloat16 on a GPU
)
model = AutoModelForCausalLM.from_pretrained(model_name, quantization_config=bnb_config, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

# 2. Adapters on every linear layer.
model = get_peft_model(
    model,
    LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM", target_modules="all-linear"),
)
model.print_trainable_parameters()

# 3. A little data: what a customer says, and the ticket it becomes.
complaints = ["the screen stays black", "the parcel never came", "I was charged twice", "the app logs me out"]
queues = ["hardware", "delivery", "billing", "software"]
rows = Dataset.from_list(
    [{"text": f"Complaint: {said}\nQueue: {queue}{tokenizer.eos_token}"} for said, queue in zip(complaints, queues, strict=True)]
    * 20
)

# 4. TRL's trainer, as it is.
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=rows,
    args=SFTConfig(
        output_dir="runs/qlora-with-transformers",
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
    ),
)
trainer.train()
model.save_pretrained("runs/qlora-with-transformers/adapter")

# 5. Ask it.
model.eval()
prompt = tokenizer("Complaint: I was charged twice\nQueue:", return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
print(tokenizer.decode(answer[0], skip_special_tokens=True))

# 6. One model again, and how much of the tune it kept:
#      lownibble merge runs/qlora-with-transformers/adapter --base MODEL --trained-on quantized --output runs/merged
